# SPDX-License-Identifier: Apache-2.0
"""Compression that follows the link."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from cryoci.ociimage import adaptive, archive, frames, image, layers
from cryoci.ociimage.adaptive import LEVELS, START, Gauge
from cryoci.ociimage.reference import LayoutRef
from tests.unit.images import make_checkpoint, tree_of


def test_it_follows_the_slower_side() -> None:
    gauge = Gauge()
    assert gauge.level == LEVELS[START] == 1
    for _ in range(100):
        gauge.note(0.001, 1.0)
    assert gauge.level == LEVELS[-1]
    for _ in range(100):
        gauge.note(1.0, 0.001)
    assert gauge.level == LEVELS[0]
    for _ in range(100):
        gauge.note(0.2, 0.8)
    assert gauge.level == LEVELS[0]


def packed(directory: Path, seconds: float) -> int:
    """Bytes of a layer whose taker needs so long for each frame."""
    plan = layers.Plan("m", (archive.File("memory", (directory / "memory").stat().st_size),))
    with frames.Pool(layers.Compression.parse("auto")) as pool:
        size = 0
        for frame in layers.Writer(directory, plan, pool, lambda n: None).open():
            size += len(frame)
            time.sleep(seconds)
        return size


def test_a_slow_link_gets_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "FRAME", 128 << 10)
    chosen = random.Random(1)
    words = [chosen.randbytes(12) for _ in range(2000)]
    (tmp_path / "memory").write_bytes(b"".join(chosen.choice(words) for _ in range(700_000)))
    assert packed(tmp_path, 0.02) < 0.95 * packed(tmp_path, 0)


def test_an_image_of_many_levels(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "ck")
    ref = LayoutRef(tmp_path / "layout", "x")
    image.push(source, ref, compression="auto")
    image.pull(ref, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(source)
    assert tuple(sorted(adaptive.LEVELS)) == adaptive.LEVELS
