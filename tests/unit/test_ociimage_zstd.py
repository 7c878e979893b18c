# SPDX-License-Identifier: Apache-2.0
"""Frames are opened on as many threads as there are, and no more at a time than memory allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from cryoci.ociimage import parallel, zstd

SIZE = 4096


class Later(parallel.Threads):
    """Notes how much there was to do at most, of which nobody had taken the result."""

    def __init__(self, layers: int, workers: int) -> None:
        super().__init__("test", layers, workers)
        self.waiting: list[Future[list[bytes]]] = []
        self.most = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[list[bytes]] = Future()
        future.set_result(fn(*args, **kwargs))
        self.waiting.append(future)
        self.most = max(self.most, len(self.waiting))
        return future


@pytest.mark.parametrize(
    ("workers", "layers", "held", "most"),
    [
        (2, 1, 1 << 20, 3),
        (8, 1, 1 << 20, 9),
        (8, 1, 5 * SIZE, 6),
        (8, 1, 0, 3),
        (8, 2, 1 << 20, 5),
        (8, 9, 1 << 20, 2),
    ],
)
def test_frames_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, workers: int, layers: int, held: int, most: int
) -> None:
    """One more than there are threads; fewer of frames that hold much, and where layers share them."""
    monkeypatch.setattr(parallel, "WIDTH", 4)
    monkeypatch.setattr(zstd, "_HELD", held)
    pieces = [os.urandom(SIZE) for _ in range(20)]
    pool = Later(layers, workers)
    compress = zstd.frame_compressor(1)

    def stream() -> Iterator[bytes]:
        for piece in pieces:
            yield compress(memoryview(piece))

    found = []
    for content in zstd.decompress(stream(), pool):
        found.append(content)
        del pool.waiting[0]
    assert found == pieces and pool.most == most
