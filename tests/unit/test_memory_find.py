# SPDX-License-Identifier: Apache-2.0
"""Which memory goes out of band, and where it may be filled in, on real processes."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
from collections.abc import Iterator

import pytest

from cryoci.errors import RestoreError
from cryoci.shim.memory import fill, find

SIZE = 4 << 20


@pytest.fixture
def forked() -> Iterator[tuple[int, int]]:
    """A child that shares an area with this process, and where that is."""
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"\1" * SIZE)
    anchor = ctypes.c_char.from_buffer(memory)
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    yield pid, ctypes.addressof(anchor)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    del anchor
    memory.close()


def test_what_a_fork_shares_is_left_to_criu_but_can_be_filled(forked: tuple[int, int]) -> None:
    pid, start = forked
    assert not any(area.start <= start < area.end for area in find.areas(pid))
    assert any(first <= start and start + SIZE <= last for first, last in find.places(pid))
    assert "Shared_Dirty" in find.describe(pid, start) and "rw-p" in find.describe(pid, start)
    fill._check_areas(pid, 1, ((start, SIZE),))


def test_a_fill_that_is_refused_says_what_is_there(forked: tuple[int, int]) -> None:
    pid, _ = forked
    with open(f"/proc/{pid}/maps") as f:
        code = next(line.split("-")[0] for line in f if " r-xp " in line and "/" in line)
    with pytest.raises(RestoreError, match=f"at {code}, where its checkpoint had, but r-xp /"):
        fill._check_areas(pid, 1, ((int(code, 16), 4096),))
    with pytest.raises(RestoreError, match="but nothing"):
        fill._check_areas(pid, 1, ((4096, 4096),))


@pytest.mark.parametrize(
    ("changed", "plain"),
    [
        ({}, True),
        ({"Swap": 8192, "SwapPss": 8192}, True),
        ({"Swap": 8192, "SwapPss": 4096}, False),  # one of its pages is another process' too
        ({"Shared_Dirty": 4096}, False),
        ({"Locked": 4096}, False),
    ],
)
def test_an_area_is_its_process_own(changed: dict[str, int], plain: bool) -> None:
    head = re.match(find._HEAD, "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 ")
    assert head is not None
    names = ("Rss", "Swap", "SwapPss", "Shared_Clean", "Shared_Dirty", "Locked")
    sizes = {**dict.fromkeys(names, 0), **changed}
    assert find._is_plain(head, sizes, frozenset("rd wr mr mw me ac sd".split())) is plain
