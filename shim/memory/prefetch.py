# SPDX-License-Identifier: Apache-2.0
"""Chunk files are read into the page cache while CRIU restores, so that the fill after it finds them there.

Only what is not there yet, only from a disk, and no more than the node's free memory holds beside the filled
processes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cryoci import trace
from cryoci.errors import CryociError
from cryoci.shim.memory import calls, chain, chunk, fill, index, placement
from cryoci.shim.memory.settings import Settings
from cryoci.shim.record import Record

_STEP = 16 << 20  # bytes that are looked up at once
_WORTH = 64 << 20


@contextmanager
def ahead(record: Record, directory: str, settings: Settings) -> Iterator[None]:
    """Read ahead during the with block, if it is of use. Never raises: the fill says what is wrong with a file."""
    reader = _start(record, directory, settings)
    try:
        yield
    finally:
        if reader is not None:
            reader.stop()


def budget(size: int, spare: int) -> int:
    """How much of `size` bytes to read ahead with `spare` bytes of memory, of which the processes get `size` too."""
    return max(0, min(size, (spare - size) // 2))


def _start(record: Record, directory: str, settings: Settings) -> _Reader | None:
    try:
        content = index.read(directory)
        size, spare = fill.size(content, directory), placement.available_memory()
        limit = budget(size, spare)
        why = f"{limit >> 20} of {size >> 20} MiB, beside the processes in {spare >> 20} MiB of free memory"
        wanted = settings.prefetch
        if not wanted:
            why = "as configured"
        elif placement.in_memory(directory):
            wanted, why = False, "they lie in memory"
        elif limit < _WORTH:
            wanted, why = False, f"only {why}" if limit < size else f"only {size >> 20} MiB"
        placement.note(record, "prefetch", {"chosen": {"prefetch": wanted}, "why": {"prefetch": why}})
        return _Reader(content, directory, limit, why) if wanted else None
    except (OSError, RuntimeError, CryociError):  # RuntimeError: no more threads
        return None


class _Reader:
    def __init__(self, content: index.Index, directory: str, limit: int, why: str) -> None:
        self._content, self._limit, self._why = content, limit, why
        self._places = chain.Places(content, directory)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cryoci-prefetch", daemon=True)
        # signals are for the main thread, which waits for them (child.py)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """Read no more."""
        self._ended.set()
        self._thread.join()
        self._places.close()

    def _run(self) -> None:
        buffer = chunk.Buffer()
        done = 0
        with trace.span("memory: prefetch", chosen=self._why) as span:
            for key, _ in self._content.chunks:
                try:
                    done += self._read(key, buffer, self._limit - done)
                except OSError:
                    pass
                if self._ended.is_set() or done >= self._limit:
                    break
            span["bytes"] = done

    def _read(self, key: chunk.Key, buffer: chunk.Buffer, limit: int) -> int:
        fd = os.open(
            key.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._places.of(key)
        )
        try:
            done, size = 0, os.fstat(fd).st_size
            for start in range(0, size, _STEP):
                if calls.cached(fd, start, min(_STEP, size - start)):
                    continue
                for at in range(start, min(start + _STEP, size), chunk.PIECE):
                    if self._ended.is_set() or done >= limit:
                        return done
                    done += os.preadv(fd, [buffer.view], at)
            return done
        finally:
            os.close(fd)
