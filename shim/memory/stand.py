# SPDX-License-Identifier: Apache-2.0
"""Where the threads of stopped processes stand while CRIU dumps them: threads.json in the container's record.

CRIU runs code of its own in each process. Should it be killed then, the kernel lets go of the threads wherever they
are: at a system call that CRIU has written over the start of the program, or in CRIU's code, where some would end
their process as soon as they run. The processes are stopped for their memory anyway (`dump`), so whatever is another
in their registers than before is CRIU's, and is put back before they run.

A first thread in CRIU's code is let be: that code notices that CRIU is gone, tidies up after itself and returns.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import Any

from cryoci.errors import RestoreError
from cryoci.files import read_json, write_atomic
from cryoci.shim.memory import find, inject
from cryoci.shim.record import Record

NAME = "threads.json"
_CODE = 16  # bytes at the start of executable memory, of which CRIU writes over eight
_RAX, _RIP = 10, 16
_RESTART_BLOCK, _EINTR = 516, 4  # the kernel has forgotten what to restart: the call was interrupted, then
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..x. .*")


def note(record: Record, pids: list[int]) -> None:
    """Write down where all threads of `pids` stand, which are stopped. Raises OSError, CheckpointError."""
    found: dict[str, Any] = {}
    for pid in pids:
        threads = {}
        for thread in find.threads(pid):
            inject.seize(thread)
            try:
                mask = inject.mask_of(thread)
                threads[str(thread)] = [inject.pack(inject.registers_of(thread)), mask.hex()]
            finally:
                inject.release(thread)
        code = [[start, end, _read(pid, start).hex()] for start, end in _executable(pid)]
        found[str(pid)] = {"born": find.born(pid), "threads": threads, "code": code}
    write_atomic(f"{record.directory}/{NAME}", json.dumps(found))


def put_back(record: Record, pid: int) -> int:
    """Put the threads of a stopped process to where they stood; returns how many were elsewhere.

    Raises RestoreError when what was noted cannot be put back.
    """
    try:
        one = read_json(f"{record.directory}/{NAME}").get(str(pid))
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as e:
        raise RestoreError(f"{record.directory}/{NAME} cannot be read: {e}") from e
    if one is None or one["born"] != find.born(pid):
        return 0
    moved = 0
    code = [(start, end) for start, end, _ in one["code"]]
    for thread, (registers, mask) in one["threads"].items():
        moved += _settle(pid, int(thread), inject.unpack(registers), bytes.fromhex(mask), code)
    for start, _, text in one["code"]:
        before = bytes.fromhex(text)
        if before and _read(pid, start) != before:
            _write(pid, start, before)
    return moved


def forget(record: Record) -> None:
    """CRIU has ended well, and has put all back itself. Never raises."""
    with suppress(OSError):
        os.unlink(f"{record.directory}/{NAME}")


def _settle(pid: int, thread: int, before: list[int], mask: bytes, code: list[tuple[int, int]]) -> bool:
    try:
        inject.seize(thread)
    except ProcessLookupError:
        return False
    try:
        now = inject.registers_of(thread)
        if now == before:
            inject.set_mask(thread, mask)
            return False
        if thread == pid and not any(start <= now[_RIP] < end for start, end in code):
            return False
        if before[_RAX] == (1 << 64) - _RESTART_BLOCK:
            before[_RAX] = (1 << 64) - _EINTR
        inject.set_registers(thread, before)
        inject.set_mask(thread, mask)
        return True
    finally:
        inject.release(thread)


def _executable(pid: int) -> list[tuple[int, int]]:
    """Its executable memory; not vsyscall, which is the kernel's."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as f:
        found = [_LINE.match(line) for line in f]
    ranges = [(int(m[1], 16), int(m[2], 16)) for m in found if m]
    return [(start, end) for start, end in ranges if end >> 63 == 0]


def _read(pid: int, start: int) -> bytes:
    """The first bytes of an area; none where they cannot be read, past the end of a file."""
    with suppress(OSError), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(start)
        return memory.read(_CODE)
    return b""


def _write(pid: int, start: int, data: bytes) -> None:
    try:
        inject.seize(pid)  # Linux may let only its tracer write to what a process cannot
        try:
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(start)
                memory.write(data)
        finally:
            inject.release(pid)
    except OSError as e:
        raise RestoreError(f"code of process {pid} at {start:x} cannot be put back: {e.strerror}") from e
