# SPDX-License-Identifier: Apache-2.0
"""Capture: the chosen areas of frozen processes become chunk files, in parallel; all durable at the return."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from cryoci.files import sync_directory
from cryoci.shim.memory import chunk, index
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.find import Process
from cryoci.shim.memory.parent import Parent
from cryoci.shim.memory.settings import Settings

if TYPE_CHECKING:
    from cryoci.shim.memory.sink import Sink

In = TypeVar("In")
Out = TypeVar("Out")


def capture(
    processes: Sequence[Process],
    directory: str,
    settings: Settings,
    parent: Parent | None = None,
    passed: Callable[[int], None] = lambda n: None,
    sink: Sink | None = None,
) -> index.Index:
    """Write all areas of `processes`, which do not run, to `directory`, and the index last.

    `settings` are those of a placement. What `parent` has already is linked there. With `sink` chunks go there, and
    `directory` gets the index alone. `passed` is told of bytes that were read, from any thread. Memory used is two
    pieces per thread, and with a sink one chunk. Raises OSError, and what the sink raises; what was written is removed
    then.
    """
    remove(directory)  # an earlier file may be a link to another checkpoint's: it must not be written to
    jobs = [(process.pid, key) for process in processes for key in keys(process, settings.chunk)]
    pagemaps = {
        process.pid: os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        for process in processes
    }
    where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    local = threading.local()

    def one(job: tuple[int, chunk.Key]) -> chunk.Written:
        if not hasattr(local, "buffer"):
            local.buffer = chunk.Buffer()
        pid, key = job
        if parent and (linked := parent.link(where, key, pid, pagemaps[pid], local.buffer)):
            passed(linked.stored)
            return linked
        if sink is not None:
            return sink.take(
                key.name,
                lambda fd: chunk.store(
                    fd, key, pid, pagemaps[pid], local.buffer, kind=settings.digest, passed=passed
                ),
            )
        return chunk.capture(
            where,
            key,
            pid,
            pagemaps[pid],
            local.buffer,
            kind=settings.digest,
            direct=settings.write == "direct",
            passed=passed,
        )

    try:
        written = each(one, jobs, settings.workers)
        areas = {p.vpid: tuple((a.start, a.end - a.start) for a in p.areas) for p in processes}
        index.write(
            directory, {pid: list(runs) for pid, runs in areas.items()}, ((w.key, w.digest) for w in written)
        )
        sync_directory(directory)
        return index.read(directory)
    except BaseException:
        remove(directory)
        raise
    finally:
        for fd in (*pagemaps.values(), where):
            os.close(fd)


def each(call: Callable[[In], Out], jobs: Sequence[In], threads: int) -> list[Out]:
    """`call` on every job, on so many threads; the first failure stops the rest and is raised."""
    with ThreadPoolExecutor(threads, "cryoci-memory") as pool:
        futures = [pool.submit(call, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def remove(directory: str) -> None:
    """Remove chunk files and index from `directory`; never raises."""
    try:
        for name in os.listdir(directory):
            if name.startswith("cryoci-memory"):
                os.unlink(f"{directory}/{name}")
    except OSError:
        pass


def keys(process: Process, size: int) -> Iterator[chunk.Key]:
    """Chunks of a process: cut where addresses are multiples of `size`."""
    for area in process.areas:
        start = area.start
        while start < area.end:
            end = min(area.end, (start // size + 1) * size)
            yield chunk.Key(process.vpid, start, (end - start) // PAGE)
            start = end
