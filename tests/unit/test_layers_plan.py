# SPDX-License-Identifier: Apache-2.0
"""ociimage/layers.py: how files are spread over layers."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cryoci.ociimage import archive, layers

SIZES = st.sampled_from([0, 100, 1 << 20, 8 << 20, 64 << 20, 3 << 30])
CHUNK = "checkpoint/cryoci-memory-1-{:x}.img"


def of(sizes: dict[str, int]) -> list[layers.Plan]:
    files = tuple(archive.File(name, size) for name, size in sorted(sizes.items()))
    return layers.plan(archive.Checkpoint(Path("/"), files, ("checkpoint",), False, {}, datetime.now(UTC)))


@given(st.lists(SIZES, max_size=1000), st.lists(SIZES, max_size=150))
def test_each_file_is_in_one_layer_and_there_are_not_too_many(chunks: list[int], others: list[int]) -> None:
    sizes = {CHUNK.format(n * (64 << 20)): size for n, size in enumerate(chunks)}
    sizes |= {f"checkpoint/pages-{n}.img": size for n, size in enumerate(others)}
    plans = of(sizes)
    assert len(plans) <= layers.MAX_LAYERS
    assert sorted(f.name for p in plans for f in p.files) == sorted(sizes)
    assert len({p.title for p in plans}) == len(plans)
    assert all("cryoci-memory-" not in f.name for f in plans[0].files)
    assert all(p.files for p in plans[1:])


@given(st.lists(SIZES, max_size=1000), st.lists(SIZES, max_size=150), st.randoms())
def test_layers_that_are_kept_leave_room_for_the_rest(
    chunks: list[int], others: list[int], dice: random.Random
) -> None:
    sizes = {CHUNK.format(n * (64 << 20)): size for n, size in enumerate(chunks)}
    sizes |= {f"checkpoint/pages-{n}.img": size for n, size in enumerate(others)}
    files = tuple(archive.File(name, size) for name, size in sorted(sizes.items()))
    checkpoint = archive.Checkpoint(Path("/"), files, ("checkpoint",), False, {}, datetime.now(UTC))
    before = [p for p in layers.plan(checkpoint) if all("cryoci-memory-" in f.name for f in p.files)]
    same = [p for p in before if dice.random() < 0.9][: layers.most_kept(checkpoint)]
    kept = {f.name for p in same for f in p.files}
    plans = layers.plan(checkpoint, kept, len(same))
    assert len(plans) + len(same) <= layers.MAX_LAYERS
    assert sorted(f.name for p in plans for f in p.files) == sorted(sizes.keys() - kept)


def test_many_chunks_share_layers_of_one_size_in_the_order_of_their_addresses() -> None:
    plans = of({CHUNK.format(n * (64 << 20)): 64 << 20 for n in range(700)})[1:]
    assert len(plans) > 60
    assert {len(p.files) for p in plans[:-1]} == {len(plans[0].files)}
    names = [f.name for p in plans for f in p.files]
    assert names == [CHUNK.format(n * (64 << 20)) for n in range(700)]


def test_few_chunks_have_a_layer_each() -> None:
    plans = of({CHUNK.format(n * (64 << 20)): 64 << 20 for n in range(98)} | {"rootfs.tar": 1 << 30})
    assert [len(p.files) for p in plans[1:]] == [1] * 99
