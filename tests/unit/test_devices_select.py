# SPDX-License-Identifier: Apache-2.0
"""Which GPU takes the place of which."""

from __future__ import annotations

from typing import Any

import pytest

from cryoci.errors import ConflictError, SpaceError, UnsupportedError
from cryoci.shim.devices.select import Gpu, choose

H, A = "NVIDIA H200", "NVIDIA A100"


def old(uuid: str, need: int = 0, chip: str = H, index: int = 0) -> Gpu:
    return Gpu(uuid, chip, index, need=need)


def new(uuid: str, free: int = 100, chip: str = H, index: int = 0) -> Gpu:
    return Gpu(uuid, chip, index, free=free)


@pytest.mark.parametrize(
    ("wanted", "available", "fixed", "result"),
    [
        ([], [new("x")], {}, {}),
        ([old("a")], [new("x")], {}, {"a": "x"}),
        ([old("a")], [new("x"), new("a")], {}, {"a": "a"}),  # the same GPU is here
        ([old("a", 9)], [new("x", 50), new("a", 5)], {}, {"a": "x"}),  # it is, and full
        ([old("a", 9)], [new("x", 50), new("y", 10)], {}, {"a": "y"}),  # the tightest fit
        ([old("a", 9), old("b", 40)], [new("x", 50), new("y", 10)], {}, {"a": "y", "b": "x"}),
        ([old("a", 5), old("b", 5)], [new("b", 9), new("x", 9)], {}, {"a": "x", "b": "b"}),
        ([old("a")], [new("x", chip=A), new("y")], {}, {"a": "y"}),
        ([old("a"), old("b")], [new("x"), new("y")], {"a": "y"}, {"a": "y", "b": "x"}),
        ([old("a"), old("b")], [new("a"), new("b")], {"a": "b", "b": "a"}, {"a": "b", "b": "a"}),
        ([old("a")], [], {}, UnsupportedError),
        ([old("a")], [new("x", chip=A)], {}, UnsupportedError),
        ([old("a"), old("b")], [new("x")], {}, UnsupportedError),
        ([old("a", 9)], [new("x", 5)], {}, SpaceError),
        ([old("a", 9)], [new("x", 5)], {"a": "x"}, SpaceError),
        ([old("a")], [new("x", chip=A)], {"a": "x"}, UnsupportedError),
        ([old("a")], [new("x")], {"b": "x"}, ConflictError),
        ([old("a")], [new("x")], {"a": "z"}, ConflictError),
        ([old("a"), old("b")], [new("x")], {"a": "x", "b": "x"}, ConflictError),
    ],
)  # fmt: skip
def test_choice(wanted: list[Gpu], available: list[Gpu], fixed: dict[str, str], result: Any) -> None:
    if isinstance(result, dict):
        assert {uuid: gpu.uuid for uuid, gpu in choose(wanted, available, fixed).items()} == result
    else:
        with pytest.raises(result):
            choose(wanted, available, fixed)


def test_other_chips_are_named() -> None:
    with pytest.raises(UnsupportedError, match=r"NVIDIA H200.*NVIDIA A100"):
        choose([old("a")], [new("x", chip=A)])
