# SPDX-License-Identifier: Apache-2.0
"""shim/criu/images.py: a memory image that is cut off must never reach CRIU."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryoci.errors import ImageError
from cryoci.shim.criu import images

PAGE = 4096
PRESENT, PARENT, LAZY = 4, 1, 2


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(**fields: int) -> bytes:
    numbers = {"pages_id": 1, "vaddr": 1, "old_pages": 2, "in_parent": 3, "flags": 4, "pages": 5}
    body = b"".join(varint(numbers[name] << 3) + varint(value) for name, value in fields.items())
    return struct.pack("<I", len(body)) + body


def pagemap(pages_id: int, *entries: bytes) -> bytes:
    return struct.pack("<II", 0x54564319, 0x56084025) + message(pages_id=pages_id) + b"".join(entries)


def lay(directory: Path, maps: dict[str, bytes], pages: dict[int, int]) -> str:
    for name, data in maps.items():
        (directory / name).write_bytes(data)
    for pages_id, size in pages.items():
        with open(directory / f"pages-{pages_id}.img", "wb") as f:
            f.truncate(size)
    return str(directory)


NEW = message(vaddr=0x400000, old_pages=0, flags=PRESENT, pages=3)


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        pytest.param([NEW], 3 * PAGE, id="criu 4.2"),
        pytest.param([message(vaddr=1, old_pages=3, flags=PRESENT)], 3 * PAGE, id="criu 4.1"),
        pytest.param([message(vaddr=1, old_pages=3)], 3 * PAGE, id="criu 3 without flags"),
        pytest.param([NEW, message(vaddr=9, pages=100, flags=PARENT)], 3 * PAGE, id="in the parent"),
        pytest.param([NEW, message(vaddr=9, old_pages=100, in_parent=1)], 3 * PAGE, id="in the parent, old"),
        pytest.param(
            [NEW, message(vaddr=9, pages=2, flags=PRESENT | LAZY)], 5 * PAGE, id="lazy pages lie there too"
        ),
        pytest.param([], 0, id="no memory"),
    ],
)
def test_every_present_page_must_be_there(tmp_path: Path, entries: list[bytes], size: int) -> None:
    directory = lay(tmp_path, {"pagemap-1.img": pagemap(7, *entries)}, {7: size})
    images.check(directory)
    if size:
        lay(tmp_path, {}, {7: size - 1})
        with pytest.raises(ImageError, match=rf"pages-7.img .* cut off: it has {size - 1} of {size} bytes"):
            images.check(directory)


def test_a_pages_file_may_be_missing_only_when_nothing_is_in_it(tmp_path: Path) -> None:
    images.check(lay(tmp_path, {"pagemap-1.img": pagemap(1)}, {}))
    with pytest.raises(ImageError, match=r"pages-2\.img"):
        images.check(lay(tmp_path, {"pagemap-shmem-9.img": pagemap(2, NEW)}, {}))


def test_a_second_pagemap_of_one_file_is_of_an_earlier_dump(tmp_path: Path) -> None:
    """podman's --keep leaves it; CRIU gives each pagemap of a dump its own file (image.c, open_pages_image_at)."""
    larger = pagemap(1, NEW, message(vaddr=9, pages=5, flags=PRESENT))
    maps = {"pagemap-1.img": pagemap(1, NEW), "pagemap-shmem-2.img": larger}
    images.check(lay(tmp_path, maps, {1: 3 * PAGE}))
    with pytest.raises(ImageError):
        images.check(lay(tmp_path, {}, {1: 2 * PAGE}))


@pytest.mark.parametrize("cut", range(1, len(pagemap(1, NEW)) - 1))
def test_a_pagemap_cut_anywhere_is_damaged_or_short(tmp_path: Path, cut: int) -> None:
    whole = pagemap(1, NEW)
    directory = lay(tmp_path, {"pagemap-1.img": whole[:cut]}, {})
    if cut == len(pagemap(1)):  # a pagemap without entries is one
        images.check(directory)
    else:
        with pytest.raises(ImageError, match="damaged"):
            images.check(directory)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_hostile_bytes_are_an_image_error_or_fine(tmp_path: Path, tail: bytes) -> None:
    directory = lay(tmp_path, {"pagemap-1.img": pagemap(1) + tail}, {1: 0})
    try:
        images.check(directory)
    except ImageError:
        pass
