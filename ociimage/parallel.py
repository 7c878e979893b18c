# SPDX-License-Identifier: Apache-2.0
"""Layers side by side: a few at a time, and the first failure (or Ctrl-C) stops the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from cryoci.errors import CryociError

_CPUS = len(os.sched_getaffinity(0))
WIDTH = max(2, min(4, _CPUS // 2))  # layers in flight; each reads, hashes and sends about 1 GB/s
WORKERS = max(2, min(8, _CPUS))  # threads that compress, or decompress, for all of them
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


def each(work: Callable[[T, Stop], R], items: Sequence[T], width: int = WIDTH) -> list[R]:
    """`work` on every item; results in order. Raises the first failure, after all threads have ended."""
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
