# SPDX-License-Identifier: Apache-2.0
"""Frames of layers: made on several threads, and the same and in order whatever these do."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backports import zstd

from cryoci.errors import ImageError
from cryoci.ociimage import archive, frames, layers, parallel

SIZE = 300_001


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "FRAME", 4096)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    (tmp_path / "memory").write_bytes(random.Random(1).randbytes(SIZE))
    return tmp_path


def writer(directory: Path, pool: frames.Pool, seen: list[int] | None = None) -> layers.Writer:
    plan = layers.Plan("m", (archive.File("memory", SIZE),))
    return layers.Writer(directory, plan, pool, (seen if seen is not None else []).append)


def opened(directory: Path) -> int:
    """How many descriptors of this process are files in there."""
    names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(name.startswith(str(directory)) for name in names)


class Uneven(frames.Pool):
    """Some frames take longer than others, so that later ones are ready first."""

    def compress(self, data: memoryview) -> bytes:
        time.sleep(random.choice((0, 0, 0.003)))
        return super().compress(data)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_in_order_with_the_digest_of_all(memory: Path, workers: int) -> None:
    seen: list[int] = []
    with Uneven(layers.Compression(), workers) as pool:
        layer = writer(memory, pool, seen)
        first = list(layer.open())
        content = b"".join(zstd.decompress(frame) for frame in first)
        assert layer.diff_id == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert len(content) == layer.plan.raw_size == sum(seen)
        assert content[512 : 512 + SIZE] == (memory / "memory").read_bytes()
        assert list(layer.open()) == first and sum(seen) == layer.plan.raw_size
    assert opened(memory) == 0


def test_one_reads_while_others_compress(memory: Path) -> None:
    both = threading.Barrier(2, timeout=10)

    class Meeting(frames.Pool):
        def compress(self, data: memoryview) -> bytes:
            if not met.is_set():
                both.wait()  # breaks, and fails the frame, unless two of them are here at once
                met.set()
            return super().compress(data)

    met = threading.Event()
    with Meeting(layers.Compression(), 2) as pool:
        assert list(writer(memory, pool).open()) and met.is_set()


def test_as_many_compress_as_there_are_threads(memory: Path) -> None:
    """Of one large layer alone, too: most memory of a process is one file."""
    all_of_them = threading.Barrier(8, timeout=10)

    class Meeting(frames.Pool):
        def compress(self, data: memoryview) -> bytes:
            if not met.is_set():
                all_of_them.wait()
                met.set()
            return super().compress(data)

    met = threading.Event()
    with Meeting(layers.Compression(), 8, layers=1) as pool:
        assert list(writer(memory, pool).open()) and met.is_set()


@pytest.mark.parametrize(
    ("workers", "many", "depth"), [(2, 1, 6), (2, 2, 6), (2, 9, 3), (8, 1, 12), (8, 2, 6), (8, 9, 3)]
)
def test_all_layers_share_the_frames_in_flight(
    monkeypatch: pytest.MonkeyPatch, workers: int, many: int, depth: int
) -> None:
    monkeypatch.setattr(parallel, "WIDTH", 4)
    with frames.Pool(layers.Compression(), workers, layers=many) as pool:
        assert pool.depth == depth


def test_a_file_that_shrinks(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with frames.Pool(layers.Compression()) as pool:
        layer = writer(memory, pool)
        chunks = layer.open()
        next(chunks)
        os.truncate(memory / "memory", SIZE // 2)
        with pytest.raises(ImageError, match="became shorter"):
            list(chunks)
        assert layer.diff_id == "" and opened(memory) == 0


def test_a_taker_that_stops(memory: Path) -> None:
    with frames.Pool(layers.Compression()) as pool:
        chunks: Iterator[bytes] = writer(memory, pool).open()
        next(chunks)
        assert opened(memory) == 1
        chunks.close()  # type: ignore[attr-defined]  # it is a generator
        assert opened(memory) == 0
        assert len(list(writer(memory, pool).open())) == -(-(SIZE + 2048) // 4096)


def test_a_compressor_that_fails(memory: Path) -> None:
    class Broken(frames.Pool):
        def compress(self, data: memoryview) -> bytes:
            raise MemoryError

    with Broken(layers.Compression()) as pool, pytest.raises(MemoryError):
        list(writer(memory, pool).open())
    assert opened(memory) == 0
