# SPDX-License-Identifier: Apache-2.0
"""Which memory can go out of band: private, anonymous, writable areas that are large and nothing special.

Left to CRIU, always: processes that share their address space, are traced or stopped already, are not of this
machine's 64-bit kind, or would notice SIGCONT; areas that are shared (also by copy-on-write after a fork),
locked, growing, backed by a file, watched by userfaultfd, with guard regions (MADV_GUARD_INSTALL; glibc 2.42 has them
at the end of stacks), or with any flag that is not known to be harmless.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from cryoci.shim import cgroup
from cryoci.shim.memory import calls

# VmFlags (proc_pid_smaps(5)) that mean nothing for the content of an area.
HARMLESS = frozenset("rd wr ex mr mw me ac nr sd hg nh mg dd".split())
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ (\d+) *(.*)")
_TOLD = frozenset("Size Rss Pss Shared_Clean Shared_Dirty Swap SwapPss Locked".split())
_SIGCONT, _SIGSTOP = 1 << 17, 1 << 18
_STATES = frozenset("RSD")
_GUARD_INSTALL = 102  # madvise(2), Linux 6.13
_PIECE = 1 << 20  # bytes that `search` reads at once


@dataclass(frozen=True)
class Area:
    """A private anonymous area, from `start` to `end`, with `resident` bytes in it."""

    start: int
    end: int
    resident: int = 0


@dataclass(frozen=True)
class Process:
    """A process with areas to move: `pid` here, `vpid` in the container as CRIU's images name it."""

    pid: int
    vpid: int
    born: int  # start time in clock ticks since boot, which tells a pid's users apart
    areas: tuple[Area, ...]


def processes(init: int, threshold: int) -> list[Process]:
    """Processes of the container of `init` with areas that hold at least `threshold` bytes.

    They must be frozen, so that nothing changes after this look.
    """
    everybody = cgroup.tree(init)
    level = depth(init)
    found = []
    for pid in everybody:
        try:
            said = status(pid)
            if not _movable(pid, said):
                continue
            chosen = _unguarded(pid, [area for area in areas(pid) if area.resident >= threshold])
            if not chosen or any(calls.same_memory(pid, other) for other in everybody if other != pid):
                continue
            numbers = said["NSpid"].split()
            found.append(Process(pid, int(numbers[level - 1]), born(pid), chosen))
        except (OSError, KeyError, IndexError):
            continue  # it has ended, or is too strange to touch
    return found


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status by its keys. Raises OSError."""
    with open(f"/proc/{pid}/status") as f:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in f)}


def depth(init: int) -> int:
    """How deep the pid namespace of `init` is: images have the number of that level of NSpid. Raises OSError."""
    return len(status(init).get("NSpid", "").split()) or 1


def search(pid: int, ranges: Iterable[tuple[int, int]], wanted: bytes) -> int | None:
    """Address of the first bytes like `wanted` in the memory of `pid` in `ranges` (start, end). Raises OSError."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end in ranges:
            for at in range(start, end, _PIECE):
                with suppress(OSError):
                    memory.seek(at)
                    found = memory.read(min(end - at, _PIECE)).find(wanted)
                    if found >= 0:
                        return at + found
    return None


def alive(pid: int, since: int) -> bool:
    """Whether the process that was started at `since` is there, and no zombie."""
    try:
        fields = stat(f"/proc/{pid}/stat")
        return int(fields[19]) == since and fields[0] not in "ZX"
    except (OSError, IndexError):
        return False


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return stat(f"/proc/{pid}/stat")[0] not in "ZX"
    except (OSError, IndexError):
        return False


def born(pid: int) -> int:
    """Start time of a process. Raises OSError."""
    return int(stat(f"/proc/{pid}/stat")[19])


def states(pid: int) -> set[str]:
    """State letters of all threads of a process (proc_pidstat(5)). Raises OSError."""
    found = set()
    for thread in threads(pid):
        try:
            found.add(stat(f"/proc/{pid}/task/{thread}/stat")[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def threads(pid: int) -> list[int]:
    """Ids of all threads. Raises OSError."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def areas(pid: int) -> list[Area]:
    """Private anonymous writable areas without any special trait. Raises OSError."""
    return list(_plain(pid))


def places(pid: int) -> list[tuple[int, int]]:
    """Start and end of private anonymous writable areas, whatever is in them. Raises OSError.

    A process that CRIU has just restored may share pages with its parent where it has none in the images: of a huge
    page that the parent had before the fork CRIU takes back those that the parent's images have. The rest is zero.
    """
    return [(int(head[1], 16), int(head[2], 16)) for head, _, flags in _all(pid) if _is_private(head, flags)]


def describe(pid: int, address: int) -> str:
    """What a process has at an address, for error messages. Raises OSError."""
    for head, sizes, flags in _all(pid):
        if int(head[1], 16) <= address < int(head[2], 16):
            shown = ", ".join(
                f"{key} {size >> 10} KiB" for key, size in sizes.items() if size and key in _TOLD
            )
            return f"{head[3]} {head[6] or 'without a name'}, {' '.join(sorted(flags))}, {shown or 'empty'}"
    return "nothing"


def _plain(pid: int) -> Iterator[Area]:
    for head, sizes, flags in _all(pid):
        if _is_plain(head, sizes, flags):
            yield Area(int(head[1], 16), int(head[2], 16), sizes["Rss"] + sizes["Swap"])


def _unguarded(pid: int, found: list[Area]) -> tuple[Area, ...]:
    """Those of `found` without guard regions, where smaps has not told them apart. Raises OSError."""
    if not found or guards_are_told():
        return tuple(found)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return tuple(area for area in found if not calls.guarded(pagemap, area.start, area.end))
    finally:
        os.close(pagemap)


@functools.cache
def guards_are_told() -> bool:
    """Whether areas with guard regions have a flag in smaps, or this kernel has no such regions."""
    with mmap.mmap(-1, calls.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as one:
        anchor = ctypes.c_char.from_buffer(one)
        at = ctypes.addressof(anchor)
        del anchor
        try:
            one.madvise(_GUARD_INSTALL)
        except OSError:
            return True
        return any(
            "gu" in flags
            for head, _, flags in _all(os.getpid())
            if int(head[1], 16) <= at < int(head[2], 16)
        )


def _all(pid: int) -> Iterator[tuple[re.Match[str], dict[str, int], frozenset[str]]]:
    """Every area of a process: its first line, sizes in bytes and flags in smaps (proc_pid_smaps(5))."""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="surrogateescape") as f:
        head: re.Match[str] | None = None
        sizes: dict[str, int] = {}
        for line in f:
            match = _HEAD.match(line)
            if match:
                head, sizes = match, {}
                continue
            key, _, value = line.partition(":")
            if key != "VmFlags":
                if value.endswith("kB\n"):
                    sizes[key] = int(value.split()[0]) << 10
                continue
            if head is not None:
                yield head, sizes, frozenset(value.split())
            head = None


def _is_plain(head: re.Match[str], sizes: dict[str, int], flags: frozenset[str]) -> bool:
    return (
        _is_private(head, flags)
        # They differ when another process has one of its pages. Shared_* count a page, too, that the kernel is
        # moving to another place just then, for compaction (Linux 6.18, fs/proc/task_mmu.c, smaps_account).
        and sizes.get("Rss", 1) == sizes.get("Pss", 0)
        and sizes.get("Locked", 1) == 0
        # the same of pages in swap
        and sizes.get("Swap", 1) == sizes.get("SwapPss", 0)
    )


def _is_private(head: re.Match[str], flags: frozenset[str]) -> bool:
    permissions, inode, name = head[3], head[5], head[6]
    return (
        permissions in ("rw-p", "rwxp")
        and inode == "0"
        and (name in ("", "[heap]") or name.startswith("[anon:"))
        and flags <= HARMLESS
    )


def _movable(pid: int, said: dict[str, str]) -> bool:
    """Whether a process can be stopped and continued unseen, and its memory is its own to lose."""
    if "VmSize" not in said or said.get("TracerPid") != "0" or not states(pid) <= _STATES:
        return False
    if int(said["SigCgt"], 16) & _SIGCONT or (int(said["ShdPnd"], 16)) & (_SIGCONT | _SIGSTOP):
        return False
    # Only the first thread's mask decides whether an unhandled SIGCONT vanishes or stays pending for all to see
    # (kernel/signal.c, sig_ignored); helper threads often block every signal (jemalloc's, redis').
    if int(said["SigBlk"], 16) & _SIGCONT:
        return False
    for thread in threads(pid):
        one = status(thread)
        if one.get("TracerPid") != "0" or int(one["SigPnd"], 16) & _SIGSTOP:
            return False
    return not _is_job(pid) and _native(pid)


def _is_job(pid: int) -> bool:
    """Whether a shell may watch it: a stop would be news to whoever controls its terminal."""
    fields = stat(f"/proc/{pid}/stat")
    session, terminal = int(fields[3]), int(fields[4])
    return terminal != 0 and session != pid


def _native(pid: int) -> bool:
    """Whether the program is a 64-bit ELF."""
    with open(f"/proc/{pid}/exe", "rb") as f:
        return f.read(5) == b"\x7fELF\x02"


def stat(path: str) -> list[str]:
    """Fields of a stat file (proc_pid_stat(5)) after the name, which may hold anything: state is the first.

    Raises OSError.
    """
    with open(path, "rb") as f:
        return f.read().rpartition(b")")[2].decode().split()
