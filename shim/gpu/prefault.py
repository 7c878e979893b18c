# SPDX-License-Identifier: Apache-2.0
"""Ahead of the driver: the host memory that a checkpoint goes to, faulted in by many threads.

cuCheckpointProcessCheckpoint maps one private anonymous area for the GPU memory of the process, has the kernel pin
it, which faults in page after page on one thread, and then copies (seen with driver 580: docs/benchmarks/gpu.md).
The same pages are faulted in from here meanwhile. Nothing is written into the process, nothing of it is stopped,
and whoever dies has changed nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cryoci import trace
from cryoci.shim.memory import calls

THREADS = 8  # of one container
LEAST = 64 << 20  # bytes of an area that are worth it
_SLACK = 256 << 20  # bytes that the driver maps besides what NVML counts
_PAUSE = 0.005  # seconds

Range = tuple[int, int]  # first address, and the one behind the last


@contextmanager
def ahead(pid: int, most: int, threads: int) -> Iterator[None]:
    """Fault in what `pid` maps while the with block runs, of areas that hold `most` bytes together at most.

    A larger one is something else, such as an address range that a program reserves. Never raises by itself.
    """
    if most < LEAST or threads < 1:
        yield
        return
    ended, blocks = threading.Event(), deque[int]()
    done = [0] * threads
    watch = threading.Thread(target=_watch, args=(pid, most + _SLACK, areas(pid), blocks, ended))
    workers = [threading.Thread(target=_work, args=(pid, blocks, ended, done, n)) for n in range(threads)]
    with trace.span(f"memory for the checkpoint of {pid}", threads=threads) as said:
        for thread in (watch, *workers):
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in (watch, *workers):
                thread.join()
            said["bytes"] = sum(done)


def areas(pid: int) -> list[Range]:
    """Private anonymous writable areas of at least LEAST bytes, in order; none of a process that is gone."""
    found = []
    with suppress(OSError, ValueError), open(f"/proc/{pid}/maps", "rb") as f:
        for line in f:
            words = line.split(maxsplit=5)
            if words[1] == b"rw-p" and words[4] == b"0":
                start, end = (int(word, 16) for word in words[0].split(b"-"))
                if end - start >= LEAST:
                    found.append((start, end))
    return found


def fresh(now: list[Range], before: list[Range]) -> list[Range]:
    """What of `now` was not there `before`: a new area may have become one with its neighbour. Both in order."""
    found = []
    for start, end in now:
        at = start
        for first, last in before:
            if last <= at or first >= end:
                continue
            if first > at:
                found.append((at, first))
            at = last
        if at < end:
            found.append((at, end))
    return found


def _watch(pid: int, room: int, known: list[Range], blocks: deque[int], ended: threading.Event) -> None:
    while not ended.wait(_PAUSE):
        now = areas(pid)
        for start, end in fresh(now, known):
            if LEAST <= end - start <= room:
                room -= end - start
                blocks.extend(range(start, end, calls.TOUCHED))
        known = now


def _work(pid: int, blocks: deque[int], ended: threading.Event, done: list[int], n: int) -> None:
    while not ended.is_set():
        try:
            start = blocks.popleft()
        except IndexError:
            ended.wait(_PAUSE)
            continue
        if not calls.touch(pid, start):
            return
        done[n] += calls.TOUCHED
