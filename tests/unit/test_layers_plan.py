# SPDX-License-Identifier: Apache-2.0
"""ociimage/layers.py: how files are spread over layers."""

from __future__ import annotations

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


def test_many_chunks_share_layers_of_one_size() -> None:
    plans = of({CHUNK.format(n * (64 << 20)): 64 << 20 for n in range(700)})
    shared = [p.raw_size for p in plans if p.title.startswith("rest-")]
    assert len(shared) == layers.SHARED
    assert max(shared) < 1.1 * min(shared)
