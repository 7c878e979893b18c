# SPDX-License-Identifier: Apache-2.0
"""What frames are made of."""

from __future__ import annotations

import random

import pytest
from backports import zstd

from cryoci.ociimage import zstd as ours


def floats(size: int) -> bytearray:
    data = bytearray(random.Random(2).randbytes(size))
    data[3::4] = bytes(60 + byte % 4 for byte in data[3::4])
    return data


@pytest.mark.parametrize("level", [1, -3, -20])
def test_fast_levels_store_what_hardly_shrinks(level: int) -> None:
    data = floats(2 << 20)
    frame = ours.frame_compressor(level)(memoryview(data))
    assert len(data) < len(frame) < len(data) + 1000 and zstd.decompress(frame) == data
    assert zstd.get_frame_info(frame).decompressed_size == len(data)
    assert frame == ours.frame_compressor(level)(memoryview(data))


def test_what_shrinks_is_compressed() -> None:
    data = floats(2 << 20)
    assert len(ours.frame_compressor(2)(memoryview(data))) < 0.95 * len(data)
    assert len(ours.frame_compressor(1)(memoryview(data[:100_000]))) < 95_000  # too small for samples
    data[1 << 20 :] = bytes(1 << 20)
    half = ours.frame_compressor(1)(memoryview(data))
    assert len(half) < 0.5 * len(data) and zstd.decompress(half) == data
    data = floats(2 << 20)
    data[: 100 << 10] = bytes(100 << 10)  # which the samples miss
    assert len(ours.frame_compressor(1)(memoryview(data))) < len(data) - (99 << 10)
