# SPDX-License-Identifier: Apache-2.0
"""shim/criu/core.py: where a thread goes on, in CRIU's image of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryoci import protobuf
from cryoci.errors import ImageError
from cryoci.protobuf import Message
from cryoci.shim.criu import core, images
from cryoci.shim.memory import berth
from tests.unit.criu_images import image, message

OLD = list(range(1000, 1027))
NEW = [(1 << 64) - 1, 0, *range(25)]


def registers(values: list[int]) -> bytes:
    return message(**{f"f{number}": value for number, value in enumerate(values, 1)}, f28=1)


def thread(values: list[int]) -> bytes:
    info = message(f1=0x7F00, f2=registers(values), f3=message(f1=1), f4=b"tls")
    return image("core", message(f1=1, f2=info, f3=message(f1=3, f2=0)))


def test_registers_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "core-7.img"
    path.write_bytes(thread(OLD))
    for _ in range(2):  # a repair may do it again
        core.set_registers(tmp_path.as_posix(), 7, NEW)
        assert path.read_bytes() == thread(NEW)
    (whole,) = images.messages(path.read_bytes())
    found = Message(whole).message(2).message(2)
    assert [found.number(n) for n in range(1, 29)] == [*NEW, 1]
    assert [one.name for one in tmp_path.iterdir()] == ["core-7.img"]


@pytest.mark.parametrize("damage", ["short", "none", "link"])
def test_a_damaged_image_is_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "core-7.img"
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(thread(OLD))
        path.symlink_to("elsewhere")
    else:
        path.write_bytes(thread(OLD)[:-1] if damage == "short" else image("core", message(f1=1)))
    with pytest.raises((ImageError, OSError)):
        core.set_registers(tmp_path.as_posix(), 7, NEW)


def test_replaced() -> None:
    inner = protobuf.field(1, b"a") + protobuf.field(2, b"bb")
    data = (
        protobuf.encode(3 << 3) + protobuf.encode(300) + protobuf.field(4, inner) + protobuf.field(5, b"z")
    )
    changed = Message(protobuf.replaced(data, (4, 2), b"c" * 200))
    assert (changed.number(3), changed.data(5)) == (300, b"z")
    assert (changed.message(4).data(1), changed.message(4).data(2)) == (b"a", b"c" * 200)
    with pytest.raises(ImageError):
        protobuf.replaced(data, (4, 9), b"")


@pytest.mark.parametrize(
    ("rax", "number", "becomes"),
    [(-512, 230, "again"), (-513, 230, "again"), (-514, 230, "again"), (-516, 230, "interrupted"),
     (-4, 230, "as it is"), (-512, -1, "as it is"), (77, 0, "as it is")],
)  # fmt: skip
def test_a_system_call_that_was_cut_off(rax: int, number: int, becomes: str) -> None:
    """As CRIU would have written it (compel, get_task_regs)."""
    before = [0] * 27
    before[10], before[15], before[16] = rax % (1 << 64), number % (1 << 64), 0x5000
    after = berth.resumed(before)
    wanted = list(before)
    if becomes == "again":
        wanted[10], wanted[16] = number, 0x5000 - 2
    elif becomes == "interrupted":
        wanted[10] = -4 % (1 << 64)
    assert after == wanted
