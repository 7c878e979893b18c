# SPDX-License-Identifier: Apache-2.0
"""Layers side by side: a few at a time, and the first failure (or Ctrl-C) stops the others.

Memory does not grow with them, nor with the CPUs beyond a few: all layers have FRAMES in flight together.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from cryoci.errors import CryociError

_CPUS = len(os.sched_getaffinity(0))
WIDTH = max(2, min(4, _CPUS // 2))  # layers in flight; each reads, hashes and sends about 1 GB/s
WORKERS = max(2, min(7, _CPUS))  # threads that compress for all of them; each takes 7 MB
OPENERS = min(4, WORKERS)  # that decompress, which is three times as fast as a layer is written (measured)
FRAMES = 12  # in flight, over all layers; each is 2 MiB of content, and up to as much compressed
LEAST = 3  # of them for a layer: read, worked on, and sent or written
_M_ARENA_MAX = -8  # malloc.h
T = TypeVar("T")
R = TypeVar("R")


class Stop:
    """Tells threads to give up."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Make every guarded stream fail at its next chunk."""
        self._event.set()

    def guard(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """`chunks`, until stopped."""
        for chunk in chunks:
            if self._event.is_set():
                raise CryociError("stopped, because another part failed")
            yield chunk


class Threads(ThreadPoolExecutor):
    """`workers` threads for the frames of `layers` at a time, of which each may have `depth` in flight."""

    def __init__(self, name: str, layers: int = 1, workers: int = OPENERS) -> None:
        one_heap()
        super().__init__(workers, name)
        self.workers = workers
        self.depth = max(LEAST, FRAMES // max(1, min(layers, WIDTH)))


@functools.cache
def one_heap() -> None:
    """Have the C library keep one heap for all threads, where each has its own.

    One thread frees what another made, and each heap keeps what is free in it to itself: with 16 CPUs that was a
    third of all memory (measured). Nobody waits for it: what is large is made under the GIL.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and one heap anyway
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def each(work: Callable[[T, Stop], R], items: Sequence[T], width: int = WIDTH) -> list[R]:
    """`work` on every item; results in order. Raises the first failure, after all threads have ended."""
    one_heap()
    stop = Stop()
    with ThreadPoolExecutor(width, "cryoci-layer") as pool:
        futures = [pool.submit(work, item, stop) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done and (error := future.exception()):
                    raise error
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
