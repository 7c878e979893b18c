# SPDX-License-Identifier: Apache-2.0
"""Where the threads of stopped processes stand while CRIU dumps them: threads.json in the container's record.

CRIU runs code of its own in each process. Should it be killed then, the kernel lets go of the threads wherever they
are: at a system call that CRIU has written over the start of the program, or in CRIU's code, and most would end
their process as soon as they run. The processes are stopped for their memory anyway (`dump`), so whatever is another
in their registers than before is CRIU's, as is any new mapping or open file: it is put back, or goes, before they run.

And CRIU's code goes back to the program by itself, which may then run for microseconds without its memory. So all of
its threads stand at a berth (berth.py) for that time, and the images, which have them there, are corrected afterwards.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cryoci.errors import RestoreError
from cryoci.files import read_json, write_atomic
from cryoci.shim.criu import core
from cryoci.shim.memory import berth, find, inject
from cryoci.shim.record import Record

NAME = "threads.json"
_CODE = 16  # bytes at the start of executable memory, of which CRIU writes over eight
_CLOSE, _MUNMAP = 3, 11
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ..([x-])")


def note(record: Record, pids: Sequence[int], level: int) -> None:
    """Write down where all threads of `pids` stand, which are stopped, and have them stand where they do no harm.

    `level` is the depth of the container's pid namespace. Raises OSError, CheckpointError, UnsupportedError.
    """
    found: dict[str, Any] = {}
    held: list[int] = []
    berths: dict[int, list[int]] = {}
    try:
        for pid in pids:
            there = areas(pid)
            loop = berth.find(pid, there)
            threads = {}
            for thread in find.threads(pid):
                inject.seize(thread)
                held.append(thread)
                before = berth.outside_of_rseq(thread, pid, inject.registers_of(thread))
                berths[thread] = berth.registers(before, loop, pid)
                number = find.status(thread)["NSpid"].split()[level - 1]
                mask = inject.mask_of(thread).hex()
                threads[str(thread)] = [inject.pack(before), mask, inject.pack(berths[thread]), int(number)]
            found[str(pid)] = {
                "born": find.born(pid),
                "threads": threads,
                "code": [[start, _read(pid, start).hex()] for start, _, runs in there if runs],
                "areas": [[start, end] for start, end, _ in there],
                "files": _files(pid),
            }
        write_atomic(f"{record.directory}/{NAME}", json.dumps(found))
        for thread, registers in berths.items():
            inject.set_registers(thread, registers)
    finally:
        for thread in held:
            inject.release(thread)


def put_back(record: Record, pid: int) -> int:
    """Put the threads of a stopped process to where they stood; returns how many CRIU has left elsewhere.

    Raises RestoreError when what was noted cannot be put back.
    """
    one = _noted(record).get(str(pid))
    if one is None or one["born"] != find.born(pid):
        return 0
    moved = 0
    for thread, (registers, mask, parked, _) in one["threads"].items():
        at = inject.unpack(registers), inject.unpack(parked)
        moved += _settle(int(thread), *at, bytes.fromhex(mask))
    for start, text in one["code"]:
        before = bytes.fromhex(text)
        if before and _read(pid, start) != before:
            _write(pid, start, before)
    _tidy(pid, one["areas"], one["files"])
    return moved


def correct(record: Record, directory: str) -> None:
    """Have CRIU's images in `directory` say where the threads really stood. May be called again.

    Raises RestoreError, ImageError, OSError.
    """
    for one in _noted(record).values():
        for registers, _, _, number in one["threads"].values():
            core.set_registers(directory, number, berth.resumed(inject.unpack(registers)))


def _noted(record: Record) -> dict[str, Any]:
    try:
        value: dict[str, Any] = read_json(f"{record.directory}/{NAME}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise RestoreError(f"{record.directory}/{NAME} cannot be read: {e}") from e
    return value


def forget(record: Record) -> None:
    """They stand where they stood, or are gone. Never raises."""
    with suppress(OSError):
        os.unlink(f"{record.directory}/{NAME}")


def _settle(thread: int, before: list[int], parked: list[int], mask: bytes) -> bool:
    try:
        inject.seize(thread)
    except ProcessLookupError:
        return False
    try:
        now = inject.registers_of(thread)
        elsewhere = now not in (before, parked)
        if elsewhere and _trapped(thread):
            inject.set_registers(thread, parked)
            inject.swallow(thread, signal.SIGTRAP)
            now = parked
        if elsewhere:  # the kernel may have forgotten what to restart
            before = berth.interrupted(before)
        if now != before:
            inject.set_registers(thread, before)
        inject.set_mask(thread, mask)
        return elsewhere
    finally:
        inject.release(thread)


def _trapped(thread: int) -> bool:
    """Has it a SIGTRAP to come? CRIU's code ends with one for its tracer, and without that it kills the process."""
    return bool(int(find.status(thread)["SigPnd"], 16) & 1 << (signal.SIGTRAP - 1))


def _tidy(pid: int, before: list[list[int]], files: list[int]) -> None:
    """Unmap what CRIU has mapped, and close its socket."""
    calls = [(_CLOSE, file, 0, 0) for file in set(_files(pid)) - set(files)]
    for start, end, _ in areas(pid):
        if not any(first < end and start < last for first, last in before):
            calls.append((_MUNMAP, start, end - start, 0))
    if calls:
        inject.make_calls(pid, calls)


def areas(pid: int) -> list[tuple[int, int, bool]]:
    """Start, end, and whether it is executable, of its memory; not vsyscall, which is the kernel's."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as f:
        found = [_LINE.match(line) for line in f]
    said = [(int(m[1], 16), int(m[2], 16), m[3] == "x") for m in found if m]
    return [one for one in said if one[1] >> 63 == 0]


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
