# SPDX-License-Identifier: Apache-2.0
"""The threads that make the frames of layers: each reads, hashes and compresses one at a time."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryoci.ociimage import adaptive, parallel

if TYPE_CHECKING:
    from cryoci.ociimage.layers import Compression


class Pool:
    """The compressing threads that all layers share; close it, or use it as a context manager.

    `depth` is how many frames a layer has in flight, where there are `layers` large ones. `spare` are buffers that
    were read into before, for whichever layer needs one next.
    """

    def __init__(
        self, compression: Compression, workers: int = parallel.WORKERS, *, layers: int = parallel.WIDTH
    ) -> None:
        self.compression = compression
        self.gauge = adaptive.Gauge() if compression.auto else None
        self._local = threading.local()
        self._threads = parallel.Threads("cryoci-compress", layers, workers)
        self.depth = min(self._threads.depth, workers + 4)
        self.spare: list[bytearray] = []

    def submit(self, work: Callable[[], Made | None]) -> Future[Made | None]:
        """Have `work` done by one of the threads; they take up what they are given in its order."""
        return self._threads.submit(work)

    def compress(self, data: memoryview) -> bytes:
        """`data` as one frame, made by the calling thread."""
        level = self.gauge.level if self.gauge is not None else self.compression.level
        known: dict[int, Callable[[memoryview], bytes]] = self._local.__dict__.setdefault("compressors", {})
        if level not in known:
            known[level] = self.compression.compressor(level)
        return known[level](data)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Made:
    """A frame, the bytes of tar in it, and which share of the time that it took was compression."""

    data: bytes
    size: int
    share: float


class Pass:
    """One pass over a layer. Each thread of the pool fetches the frame that it compresses.

    It reads the next one and hashes it when its turn comes, and compresses it while another reads: what was read is in
    the caches of that processor, and nobody waits who has nothing else to do.
    """

    def __init__(
        self,
        pool: Pool,
        frames: Generator[tuple[memoryview, bytearray]],
        *,
        digested: bool,
    ) -> None:
        self._pool, self._frames = pool, frames
        self._hash = hashlib.sha256() if digested else None
        self._turn = threading.Condition()
        self._begun = 0  # frames that were asked for
        self._read = 0  # frames whose turn is over
        self._closed = False

    def begin(self) -> Future[Made | None]:
        """Ask for the next frame; None when there are no more."""
        number = self._begun
        self._begun += 1
        return self._pool.submit(lambda: self._make(number))

    def digest(self) -> str:
        """`sha256:<hex>` of all that was read."""
        assert self._hash
        return f"sha256:{self._hash.hexdigest()}"

    def close(self) -> None:
        """Let go of the files; waits for whoever reads one."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            self._frames.close()

    def _make(self, number: int) -> Made | None:
        began = time.monotonic()
        with self._turn:
            # whoever has an earlier number runs already, so this ends
            self._turn.wait_for(lambda: self._read == number or self._closed)
            try:
                found = None if self._closed else next(self._frames, None)
                if found is None:
                    return None
                view, buffer = found
                if self._hash is not None:
                    self._hash.update(view)
            finally:
                self._read += 1
                self._turn.notify_all()
        had = time.monotonic()
        data = self._pool.compress(view)
        ended = time.monotonic()
        made = Made(data, len(view), (ended - had) / ((ended - began) or 1.0))
        view.release()
        self._pool.spare.append(buffer)
        return made
