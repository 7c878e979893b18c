# SPDX-License-Identifier: Apache-2.0
"""Which memory goes out of band, and where it may be filled in, on real processes."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import RestoreError
from cryoci.shim.memory import calls, fill, find, freezer, inject

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


GROWS_DOWN, LOCKED = 0x100, 0x2000
DONTFORK, DONTDUMP, WIPEONFORK = 10, 16, 18
PLAIN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def _registered(address: int) -> int:
    """A userfaultfd that watches an area."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(libc.syscall(323, os.O_CLOEXEC | 1))  # for faults of this program only
    if fd < 0:
        pytest.skip("no userfaultfd here")
    fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
    fcntl.ioctl(fd, 0xC020AA00, struct.pack("QQQQ", address, SIZE, 1, 0))
    return fd


@pytest.mark.parametrize(
    ("kind", "flags", "advice", "moves"),
    [
        ("plain", PLAIN, None, True),
        ("no huge pages", PLAIN, mmap.MADV_NOHUGEPAGE, True),
        ("not in core files", PLAIN, DONTDUMP, True),
        ("shared", mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, None, False),
        ("grows", PLAIN | GROWS_DOWN, None, False),
        ("locked", PLAIN | LOCKED, None, False),
        ("not for children", PLAIN, DONTFORK, False),
        ("empty for children", PLAIN, WIPEONFORK, False),
        ("of a file", mmap.MAP_PRIVATE, None, False),
        ("secret", mmap.MAP_SHARED, None, False),
        ("watched", PLAIN, None, False),
    ],
)
def test_only_memory_without_special_traits_goes(
    kind: str, flags: int, advice: int | None, moves: bool, tmp_path: Path
) -> None:
    fd = -1
    if kind == "of a file":
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    elif kind == "secret":
        fd = int(ctypes.CDLL(None, use_errno=True).syscall(447, 0))
        if fd < 0:
            pytest.skip("this kernel has no memfd_secret turned on")
    if fd >= 0:
        os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE, flags=flags) as memory:
        memory.write(b"\1" * SIZE)
        if advice is not None:
            memory.madvise(advice)
        anchor = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(anchor)
        del anchor
        watch = _registered(start) if kind == "watched" else -1
        found = [area for area in find.areas(os.getpid()) if area.start <= start < area.end]
        assert bool(found) == moves
        for one in (fd, watch):
            if one >= 0:
                os.close(one)


# ELF of 32 bits: a loop of pause(2) by int 0x80
_CODE = bytes.fromhex("b81d000000cd80ebf7")
_OLD = (
    b"\x7fELF\1\1\1" + bytes(9)
    + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x8048054, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    + struct.pack("<8I", 1, 0, 0x8048000, 0x8048000, 84 + len(_CODE), 84 + len(_CODE), 5, 0x1000)
    + _CODE
)  # fmt: skip


def test_a_program_of_32_bits_is_left_alone(tmp_path: Path, forked: tuple[int, int]) -> None:
    assert find._movable(forked[0], find.status(forked[0]))
    program = tmp_path / "old"
    program.write_bytes(_OLD)
    program.chmod(0o755)
    try:
        running = subprocess.Popen([program])
    except OSError:
        pytest.skip("this kernel runs no programs of 32 bits")
    try:
        assert running.poll() is None
        assert not find._movable(running.pid, find.status(running.pid))
    finally:
        running.kill()
        running.wait()


def test_calls_are_made_in_a_process_without_a_vdso() -> None:
    with open("/proc/self/maps") as f:
        start, end = next(line.split()[0].split("-") for line in f if "[vdso]" in line)
    libc = ctypes.CDLL(None)
    pid = os.fork()
    if pid == 0:
        libc.munmap(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(int(end, 16) - int(start, 16)))
        libc.pause()
        os._exit(1)
    try:
        while "[vdso]" in Path(f"/proc/{pid}/maps").read_text():
            time.sleep(0.001)
        freezer.stop([pid])
        freezer.await_stopped([pid])
        assert inject.make_calls(pid, [(39, 0, 0, 0), (3, 1 << 20, 0, 0)]) == [pid, -9]  # getpid, close
        freezer.proceed([pid])
        while "S" not in find.states(pid):
            time.sleep(0.001)
        assert Path(f"/proc/{pid}/syscall").read_text().split()[0] == "34"  # back in pause(2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
