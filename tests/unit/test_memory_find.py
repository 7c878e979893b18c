# SPDX-License-Identifier: Apache-2.0
"""Which memory goes out of band, and where it may be filled in, on real processes."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from cryoci.errors import RestoreError
from cryoci.shim.memory import calls, fill, find

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


def test_one_page_that_a_fork_shares_is_enough() -> None:
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(b"\1" * SIZE)
        anchor = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(anchor)
        del anchor
        pid = os.fork()
        if pid == 0:
            memory[4096:] = bytes(SIZE - 4096)
            time.sleep(60)
            os._exit(0)
        try:
            while memory_of(pid, start)["Shared_Dirty"] != 4096:
                time.sleep(0.001)
            assert not any(area.start <= start < area.end for area in find.areas(os.getpid()))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert any(area.start <= start < area.end for area in find.areas(os.getpid()))


def memory_of(pid: int, address: int) -> dict[str, int]:
    return next(sizes for head, sizes, _ in find._all(pid) if int(head[1], 16) <= address < int(head[2], 16))


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
        ({"Shared_Dirty": 4096, "Pss": 6144}, False),
        ({"Shared_Clean": 4096, "Pss": 6144}, False),
        ({"Shared_Dirty": 4096}, True),  # the kernel moves it to another place just now (compaction)
        ({"Locked": 4096}, False),
    ],
)
def test_an_area_is_its_process_own(changed: dict[str, int], plain: bool) -> None:
    head = re.match(find._HEAD, "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 ")
    assert head is not None
    names = ("Swap", "SwapPss", "Shared_Clean", "Shared_Dirty", "Locked")
    sizes = {**dict.fromkeys(names, 0), "Rss": 8192, "Pss": 8192, **changed}
    assert find._is_plain(head, sizes, frozenset("rd wr mr mw me ac sd".split())) is plain


@pytest.mark.parametrize("told", ["by smaps", "by a scan"])
def test_an_area_with_guard_regions_is_left_to_criu(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look present and cannot be read. Linux has them since 6.13, and later a flag for them in smaps."""
    if told == "by a scan":
        monkeypatch.setattr(find, "HARMLESS", find.HARMLESS | {"gu"})
        monkeypatch.setattr(find, "guards_are_told", lambda: False)
    elif not find.guards_are_told():
        pytest.skip("this kernel's smaps has no flag for them")
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"\1" * SIZE)
        anchor = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(anchor)
        del anchor
        pid = os.getpid()

        def chosen() -> bool:
            found = find._unguarded(pid, find.areas(pid))
            return any(area.start <= start < area.end for area in found)

        assert chosen()
        try:
            memory.madvise(102, SIZE // 2, 4096)
        except OSError:
            pytest.skip("this kernel has no guard regions (before Linux 6.13)")
        with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
            if not calls.guarded(pagemap.fileno(), start, start + SIZE) and told == "by a scan":
                pytest.skip("this kernel's scan does not tell them (before Linux 6.15)")
            assert not calls.guarded(pagemap.fileno(), start, start + SIZE // 2)
        assert not chosen()


def test_a_kernel_without_a_flag_for_guard_regions_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(pid: int) -> Iterator[tuple[re.Match[str], dict[str, int], frozenset[str]]]:
        for head, sizes, flags in every(pid):
            yield head, sizes, flags - {"gu"}

    if "gu" not in _flags_of_a_guarded_area():
        pytest.skip("this kernel has no guard regions (before Linux 6.13)")
    every = find._all
    monkeypatch.setattr(find, "_all", silent)
    assert not find.guards_are_told.__wrapped__()


def _flags_of_a_guarded_area() -> frozenset[str]:
    with mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(anchor)
        del anchor
        try:
            memory.madvise(102)
        except OSError:
            return frozenset()
        return next(
            flags
            for head, _, flags in find._all(os.getpid())
            if int(head[1], 16) <= start < int(head[2], 16)
        )
