# SPDX-License-Identifier: Apache-2.0
"""Fill: chunk files go back into the memory of processes that are stopped, in parallel."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from cryoci.errors import RestoreError
from cryoci.shim.memory import calls, chain, chunk, find, supply
from cryoci.shim.memory.capture import each
from cryoci.shim.memory.index import Index
from cryoci.shim.memory.supply import Supply


def size(index: Index, directory: str) -> int:
    """Bytes of pages in the chunk files of `index`, whose images are in `directory`. Raises ImageError."""
    total = 0
    with chain.Places(index, directory) as places:
        for key, _ in index.chunks:
            with suppress(OSError):  # `fill` says what is wrong with it
                stored = os.stat(key.name, dir_fd=places.of(key), follow_symlinks=False).st_size
                total += max(0, stored - chunk.data_offset(key.pages))
    return total


def fill(
    index: Index,
    directory: str,
    pids: Mapping[int, int],
    threads: int,
    passed: Callable[[int], None] = lambda n: None,
    source: Supply | None = None,
) -> int:
    """Write all chunks in `directory`, or of `source`, to the processes.

    `pids` maps pids in the container to those here.
    Returns how many bytes were written; `passed` is told as they are, from any thread.
    Writing twice does no harm. Raises RestoreError when a process or its areas are not there, ImageError and
    IntegrityError when a chunk is not what was captured: the processes must not go on then.
    """
    for vpid, runs in index.areas.items():
        if vpid not in pids:
            raise RestoreError(
                f"process {vpid} of the container, whose memory is to be filled, is not there"
            )
        _check_areas(pids[vpid], vpid, runs)
    places = chain.Places(index, directory) if source is None else None
    local = threading.local()

    def opened(key: chunk.Key, digest: str) -> chunk.Reader:
        if places is not None:
            return chunk.Reader(places.of(key), key, digest)
        assert source is not None
        return supply.opened(source, key, digest)

    def one(job: tuple[chunk.Key, str]) -> int:
        key, digest = job
        total = 0
        if not hasattr(local, "buffer"):
            local.buffer = chunk.Buffer()
        with opened(key, digest) as reader:
            for runs, size in reader.pieces(local.buffer):
                done = calls.write(pids[key.vpid], runs, local.buffer.address)
                if done != size:
                    raise RestoreError(
                        f"memory of process {key.vpid} of the container could not be filled at {runs[0][0]:x}",
                        hint="see the node's free memory and the container's limit",
                    )
                total += done
                passed(done)
        return total

    try:
        return sum(each(one, index.chunks, threads))
    except OSError as e:
        raise RestoreError(
            f"memory of the container could not be filled: {e.strerror}",
            hint="see the node's free memory and the container's limit",
        ) from e
    finally:
        if places is not None:
            places.close()


def _check_areas(pid: int, vpid: int, runs: tuple[calls.Run, ...]) -> None:
    """Each run must lie in private anonymous memory, be it in several areas by now."""
    there = find.places(pid)
    for start, size in runs:
        at = start
        for first, end in there:
            if first <= at < end:
                at = end
        if at < start + size:
            raise RestoreError(
                f"process {vpid} of the container has no private memory at {at:x}, where its checkpoint had, but "
                f"{find.describe(pid, at)}",
                hint="the checkpoint is damaged, or its files are of two checkpoints",
            )
