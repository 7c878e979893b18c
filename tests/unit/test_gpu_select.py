# SPDX-License-Identifier: Apache-2.0
"""Which GPU stands for which: the table."""

from __future__ import annotations

import dataclasses

import pytest

from cryoci.errors import CryociError, SpaceError, UnsupportedError, UsageError
from cryoci.shim.gpu.nvml import Gpu, uuid_bytes
from cryoci.shim.gpu.select import Wanted, choose, pairs, parse_map

# Not those of the worker (fakegpu.build): they are part of the tests' names, which all workers must agree on.
A, B, C, D = (f"GPU-{n:08x}-0000-4000-8000-{n:012x}" for n in range(1, 5))


def gpu(uuid: str, index: int, free: int = 10, name: str = "H200", mig: bool = False) -> Gpu:
    return Gpu(uuid, name, index, index, "9.0", 100, free, mig)


def wanted(uuid: str, need: int = 1, name: str = "H200") -> Wanted:
    return Wanted(uuid, name, need)


@pytest.mark.parametrize(
    ("old", "here", "fixed", "result"),
    [
        ([wanted(A)], [gpu(A, 0), gpu(B, 1, 90)], {}, {A: A}),  # itself before the emptier one
        ([wanted(A)], [gpu(B, 0, 5), gpu(C, 1, 90)], {}, {A: C}),  # else the emptier one
        ([wanted(A)], [gpu(B, 0, 90, "L4"), gpu(C, 1, 5)], {}, {A: C}),  # of the same chip
        ([wanted(A)], [gpu(B, 0, 90, mig=True), gpu(C, 1, 5)], {}, {A: C}),
        ([wanted(A, 1), wanted(B, 8)], [gpu(C, 0, 2), gpu(D, 1, 9)], {}, {A: C, B: D}),  # the largest first
        ([wanted(A), wanted(B)], [gpu(A, 0), gpu(B, 1)], {A: B, B: A}, {A: B, B: A}),
        ([wanted(A), wanted(B)], [gpu(A, 0), gpu(B, 1)], {"0": "1"}, {A: B, B: A}),  # by index, rest follows
        ([wanted(A), wanted(B)], [gpu(A, 0), gpu(B, 1)], {"1": "0"}, {A: B, B: A}),  # whichever is named
        ([wanted(A), wanted(B)], [gpu(A, 0), gpu(C, 1, 90)], {B: A}, {A: C, B: A}),
        ([wanted(A)], [gpu(A, 0), gpu(B, 1)], {A: "1"}, {A: B}),
        ([wanted(A, 0)], [gpu(B, 0, 0)], {}, {A: B}),  # a GPU that it only saw
        ([], [gpu(A, 0)], {}, {}),
    ],
)
def test_choices(old: list[Wanted], here: list[Gpu], fixed: dict[str, str], result: dict[str, str]) -> None:
    assert {uuid: new.uuid for uuid, new in choose(old, here, fixed).items()} == result


@pytest.mark.parametrize(
    ("old", "here", "fixed", "error", "text"),
    [
        ([wanted(A)], [gpu(B, 0, name="L4")], {}, UnsupportedError, f"another H200 (in place of {A}).*L4"),
        ([wanted(A)], [], {}, UnsupportedError, "no other GPU"),
        ([wanted(A), wanted(B)], [gpu(C, 0)], {}, UnsupportedError, "another H200"),
        ([wanted(A, 11)], [gpu(A, 0, 10)], {}, SpaceError, "0 MiB free"),
        ([wanted(A)], [gpu(B, 0, name="L4")], {A: B}, UnsupportedError, "made on H200.*is L4"),
        ([wanted(A)], [gpu(B, 0, mig=True)], {A: B}, UnsupportedError, "split by MIG"),
        ([wanted(A)], [gpu(B, 0)], {C: B}, UsageError, "no GPU of the checkpoint"),
        ([wanted(A)], [gpu(B, 0)], {A: C}, UsageError, "no GPU that the container gets"),
        ([wanted(A), wanted(B)], [gpu(C, 0), gpu(D, 1)], {A: C, B: C}, UsageError, "to two GPUs"),
    ],
)
def test_refusals(
    old: list[Wanted], here: list[Gpu], fixed: dict[str, str], error: type[CryociError], text: str
) -> None:
    with pytest.raises(error, match=text.replace("(", r"\(").replace(")", r"\)")) as caught:
        choose(old, here, fixed)
    assert type(caught.value) is error


def test_map_for_the_driver() -> None:
    """Nothing for identity; else every GPU, those that stay too (cuda-python#1983)."""
    assert pairs({A: gpu(A, 0), B: gpu(B, 1)}) is None
    both = {A: gpu(A, 0), B: gpu(C, 1)}
    assert pairs(both) == {uuid_bytes(A): uuid_bytes(A), uuid_bytes(B): uuid_bytes(C)}


def test_parse_map() -> None:
    assert parse_map("auto") == {}
    assert parse_map(f"{A}={B}, 1=0") == {A: B, "1": "0"}
    for text in ("", "x", "=1", "1=", "1=2,1=3"):
        with pytest.raises(UsageError, match="no device map"):
            parse_map(text)
    with pytest.raises(ValueError, match="UUID"):
        uuid_bytes("GPU-12")
    assert dataclasses.replace(gpu(A, 0)).key == uuid_bytes(A)
