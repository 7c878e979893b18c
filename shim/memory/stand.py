# SPDX-License-Identifier: Apache-2.0
"""Where the threads of stopped processes stand while CRIU dumps them: threads.json in the container's record.

CRIU runs code of its own in each process. Should it be killed then, the kernel lets go of the threads wherever they
are: at a system call that CRIU has written over the start of the program, or in CRIU's code, and most would end
their process as soon as they run. The processes are stopped for their memory anyway (`dump`), so whatever is another
in their registers than before is CRIU's, as is any new mapping or open file: it is put back, or goes, before they run.
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
_RAX = 10  # in struct user_regs_struct
_CLOSE, _MUNMAP = 3, 11
_RESTART_BLOCK, _EINTR = 516, 4  # the kernel has forgotten what to restart: the call was interrupted, then
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..([x-])")


def note(record: Record, pids: list[int]) -> None:
    """Write down where all threads of `pids` stand, which are stopped. Raises OSError, CheckpointError."""
    found: dict[str, Any] = {}
    for pid in pids:
        threads = {}
        for thread in find.threads(pid):
            inject.seize(thread)
            try:
                threads[str(thread)] = [
                    inject.pack(inject.registers_of(thread)),
                    inject.mask_of(thread).hex(),
                ]
            finally:
                inject.release(thread)
        code = [[start, _read(pid, start).hex()] for start, _, runs in _areas(pid) if runs]
        areas = [[start, end] for start, end, _ in _areas(pid)]
        found[str(pid)] = {
            "born": find.born(pid), "threads": threads, "code": code, "areas": areas, "files": _files(pid),
        }  # fmt: skip
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
    for thread, (registers, mask) in one["threads"].items():
        moved += _settle(int(thread), inject.unpack(registers), bytes.fromhex(mask))
    for start, text in one["code"]:
        before = bytes.fromhex(text)
        if before and _read(pid, start) != before:
            _write(pid, start, before)
    _tidy(pid, one["areas"], one["files"])
    return moved


def forget(record: Record) -> None:
    """CRIU has ended well, and has put all back itself. Never raises."""
    with suppress(OSError):
        os.unlink(f"{record.directory}/{NAME}")


def _settle(thread: int, before: list[int], mask: bytes) -> bool:
    try:
        inject.seize(thread)
    except ProcessLookupError:
        return False
    try:
        differs = inject.registers_of(thread) != before
        if differs:
            if before[_RAX] == (1 << 64) - _RESTART_BLOCK:
                before[_RAX] = (1 << 64) - _EINTR
            inject.set_registers(thread, before)
        inject.set_mask(thread, mask)
        return differs
    finally:
        inject.release(thread)


def _tidy(pid: int, areas: list[list[int]], files: list[int]) -> None:
    """Unmap what CRIU has mapped, and close its socket."""
    calls = [(_CLOSE, file, 0, 0) for file in set(_files(pid)) - set(files)]
    for start, end, _ in _areas(pid):
        if not any(first < end and start < last for first, last in areas):
            calls.append((_MUNMAP, start, end - start, 0))
    if calls:
        inject.make_calls(pid, calls)


def _areas(pid: int) -> list[tuple[int, int, bool]]:
    """Start, end, and whether it is executable, of its memory; not vsyscall, which is the kernel's."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as f:
        found = [_LINE.match(line) for line in f]
    areas = [(int(m[1], 16), int(m[2], 16), m[3] == "x") for m in found if m]
    return [one for one in areas if one[1] >> 63 == 0]


def _files(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]


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
