# SPDX-License-Identifier: Apache-2.0
"""Where a thread stands that may run before its process has its memory again: an instruction that harms nothing.

CRIU's code in a process goes back to what the process did as soon as CRIU is gone, and the kernel stops it again only
some microseconds later. So its threads stand at a jump to itself meanwhile, or, in a program that has no such bytes,
at a call of pause(2) (x86-64).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from cryoci.shim.memory import calls, inject
from cryoci.shim.memory.find import search
from cryoci.shim.memory.inject import ORIG_RAX, RAX, RIP

_LOOP = b"\xeb\xfe"  # jmp .
_SPARED = 16  # bytes at the start of executable memory, of which CRIU writes over some
_PAUSE = 34
_NONE = (1 << 64) - 1
_GET_RSEQ = 0x420F  # PTRACE_GET_RSEQ_CONFIGURATION, Linux 5.13
_RSEQ_CS = 8  # offset in struct rseq
# what a system call that was cut off returns within the kernel
_NOHAND, _SYS, _NOINTR, _BLOCK = 514, 512, 513, 516
_EINTR = 4
_SYSCALL_SIZE = 2


def find(pid: int, areas: Sequence[tuple[int, int, bool]]) -> int | None:
    """Address of a jump to itself in executable memory of `pid`, whose (start, end, executable) are `areas`."""
    return search(pid, ((start + _SPARED, end) for start, end, runs in areas if runs), _LOOP)


def registers(before: Sequence[int], loop: int | None, pid: int) -> list[int]:
    """Those of a thread at its berth. Raises UnsupportedError where the process has neither."""
    made = list(before)
    made[ORIG_RAX] = _NONE  # it is in no system call that the kernel would restart
    if loop is None:
        made[RIP], made[RAX] = inject.gadget(pid), _PAUSE
    else:
        made[RIP] = loop
    return made


def outside_of_rseq(thread: int, pid: int, before: list[int]) -> list[int]:
    """`before`, at its abort handler if it was in a restartable sequence: the kernel forgets that one at the berth.

    Where the sequence lies in memory that is away the kernel does it itself, once that is back.
    """
    raw = ctypes.create_string_buffer(24)  # struct ptrace_rseq_configuration
    try:
        calls.ptrace(_GET_RSEQ, thread, len(raw), raw)
        address = int.from_bytes(raw.raw[:8], "little")
        if not address:
            return before
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address + _RSEQ_CS)
            described = int.from_bytes(memory.read(8), "little")
            if not described:
                return before
            memory.seek(described)
            _, _, start, size, abort = struct.unpack("<IIQQQ", memory.read(32))
    except (OSError, struct.error):
        return before  # an older kernel, or nothing that it would follow
    if 0 <= before[RIP] - start < size:
        return [abort if place == RIP else value for place, value in enumerate(before)]
    return before


def resumed(before: Sequence[int]) -> list[int]:
    """Registers from which another kernel does what this one would: CRIU's rule (compel, get_task_regs)."""
    made = list(before)
    said = (1 << 64) - made[RAX]
    if made[ORIG_RAX] >> 63 == 0:
        if said in (_NOHAND, _SYS, _NOINTR):
            made[RAX] = made[ORIG_RAX]
            made[RIP] -= _SYSCALL_SIZE
        else:
            made = interrupted(made)
    return made


def interrupted(before: Sequence[int]) -> list[int]:
    """Registers of a thread for which nobody knows any more what the kernel was to restart: that call was cut off."""
    made = list(before)
    if made[RAX] == _NONE + 1 - _BLOCK:
        made[RAX] = _NONE + 1 - _EINTR
    return made
