# SPDX-License-Identifier: Apache-2.0
"""System calls that Python has no name for: reading and writing another process' memory, ptrace, PAGEMAP_SCAN."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence

PAGE = os.sysconf("SC_PAGE_SIZE")
IOV_MAX = 1024
Run = tuple[int, int]  # start address and length in bytes, both multiples of PAGE

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("process_vm_readv", "process_vm_writev"):
    getattr(_libc, _name).restype = ctypes.c_ssize_t
    getattr(_libc, _name).argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    ]  # fmt: skip
_libc.memcmp.restype = ctypes.c_int
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long

# linux/fs.h, "Pagemap ioctl": struct pm_scan_arg and page_region
_PAGEMAP_SCAN = 0xC0606610
_PRESENT, _SWAPPED, _ZERO, _GUARD = 1 << 3, 1 << 4, 1 << 5, 1 << 8
_REGIONS = 4096
_UNKNOWN = (22, 25)  # EINVAL, ENOTTY: Linux before 6.7, or before that category
TOUCHED = 1024 * PAGE  # PVM_MAX_USER_PAGES: what process_vm_writev takes at a time
_NOTHING = PAGE  # no program has anything there (vm.mmap_min_addr)
_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_VM = 1
_CACHESTAT = 451  # on every kind of machine


def failure(what: str) -> OSError:
    """The OSError for errno of the call that has just failed."""
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def read(pid: int, runs: Sequence[Run], address: int) -> int:
    """Copy `runs` of `pid` one after another to our own `address`; returns the bytes copied. Raises OSError."""
    return _transfer(_libc.process_vm_readv, "process_vm_readv", pid, runs, address)


def write(pid: int, runs: Sequence[Run], address: int) -> int:
    """Copy what lies at our own `address` to `runs` of `pid`; returns the bytes copied. Raises OSError."""
    return _transfer(_libc.process_vm_writev, "process_vm_writev", pid, runs, address)


def equal(first: int, second: int, size: int) -> bool:
    """Whether the bytes at two of our own addresses are the same; other threads run meanwhile."""
    return bool(_libc.memcmp(first, second, size) == 0)


def touch(pid: int, start: int) -> bool:
    """Fault in TOUCHED bytes of `pid` at `start`, as a write to them would. False once it is gone.

    Nothing is written: it comes from an address of ours that has no memory. The kernel first gets as many of the
    other's pages as it takes at a time, then has nothing to copy (EFAULT; process_vm_rw_single_vec in
    mm/process_vm_access.c).
    """
    try:
        _transfer(_libc.process_vm_writev, "process_vm_writev", pid, [(start, TOUCHED)], _NOTHING)
    except OSError as e:
        return e.errno == errno.EFAULT
    return True


def _transfer(call: ctypes._NamedFuncPointer, name: str, pid: int, runs: Sequence[Run], address: int) -> int:
    flat = [number for run in runs for number in run]
    remote = struct.pack(f"{len(flat)}Q", *flat)
    local = struct.pack("2Q", address, sum(flat[1::2]))
    done: int = call(pid, local, 1, remote, len(runs), 0)
    if done < 0:
        raise failure(name)
    return done


def present(pagemap: int, start: int, end: int) -> list[Run]:
    """Runs of pages between two addresses that hold anything but the zero page; `pagemap` is an open
    /proc/PID/pagemap. Raises OSError."""
    try:
        return _scan(pagemap, start, end)
    except OSError as e:
        if e.errno not in _UNKNOWN:
            raise
    return _entries(pagemap, start, end)


def _scan(pagemap: int, start: int, end: int) -> list[Run]:
    regions = ctypes.create_string_buffer(24 * _REGIONS)
    found: list[Run] = []
    while start < end:
        wanted = (_ZERO, _ZERO, _PRESENT | _SWAPPED, _ZERO)
        count = _ask(pagemap, start, end, regions, _REGIONS, 0, wanted)
        for first, last, _ in struct.iter_unpack("3Q", regions.raw[: 24 * count]):
            _append(found, first, last - first)
        # Not from `walk_end`: after more than 512 regions it is where the kernel's own buffer was full last, although
        # all regions behind it are there (6.18, fs/proc/task_mmu.c, do_pagemap_scan).
        if count < _REGIONS:
            break
        start = found[-1][0] + found[-1][1]
    return found


def guarded(pagemap: int, start: int, end: int) -> bool:
    """Whether there are guard regions (MADV_GUARD_INSTALL) between two addresses, which read as SIGSEGV.

    False where the kernel does not say (before Linux 6.15). Raises OSError.
    """
    region = ctypes.create_string_buffer(24)
    try:
        return _ask(pagemap, start, end, region, 1, 1, (0, _GUARD, 0, _GUARD)) > 0
    except OSError as e:
        if e.errno not in _UNKNOWN:
            raise
    return False


def _ask(
    pagemap: int,
    start: int,
    end: int,
    regions: ctypes.Array[ctypes.c_char],
    room: int,
    pages: int,
    categories: tuple[int, int, int, int],
) -> int:
    """How many regions there are in `regions`, which has room for so many; of at most `pages` (0: any number).

    `categories` are inverted, needed, of which one is needed, and told.
    """
    head = (96, 0, start, end, 0, ctypes.addressof(regions), room, pages)
    return int(fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(struct.pack("12Q", *head, *categories))))


def _entries(pagemap: int, start: int, end: int) -> list[Run]:
    """The same from /proc/PID/pagemap's entries (proc_pid_pagemap(5)); the zero page counts as present."""
    found: list[Run] = []
    data = os.pread(pagemap, (end - start) // PAGE * 8, start // PAGE * 8)
    for index, (entry,) in enumerate(struct.iter_unpack("Q", data)):
        if entry >> 62:  # present or swapped
            _append(found, start + index * PAGE, PAGE)
    return found


def _append(found: list[Run], start: int, size: int) -> None:
    if found and found[-1][0] + found[-1][1] == start:
        found[-1] = (found[-1][0], found[-1][1] + size)
    else:
        found.append((start, size))


def cached(fd: int, start: int, size: int) -> bool:
    """Whether all of a range of an open file is in the page cache (cachestat, Linux 6.5); before, False."""
    found = ctypes.create_string_buffer(40)
    if _libc.syscall(_CACHESTAT, fd, struct.pack("2Q", start, size), found, 0) != 0:
        return False
    pages: int = struct.unpack_from("Q", found)[0]
    return pages >= -(-size // PAGE)


def ptrace(request: int, pid: int, address: int | None = None, data: object = None) -> int:
    """ptrace(2). Raises OSError."""
    result: int = _libc.ptrace(request, pid, address, data)
    if result < 0:
        raise failure(f"ptrace request {request:#x} of {pid}")
    return result


def same_memory(first: int, second: int) -> bool:
    """Whether two processes share their address space (kcmp(2)); True where that cannot be told."""
    number = _KCMP.get(os.uname().machine)
    if number is None:
        return True
    return bool(_libc.syscall(number, first, second, _KCMP_VM, 0, 0) in (0, -1))
