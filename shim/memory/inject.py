# SPDX-License-Identifier: Apache-2.0
"""Drop: have a stopped process give its own pages back, by system calls injected with ptrace (x86-64).

The process is in a group stop (SIGSTOP): its other threads stay where they are, and should this program die
the kernel puts the one that runs back into the stop (kernel/ptrace.c, __ptrace_unlink). What was saved of it
stands in the journal then, for `heal`.

A thread inside of a system call keeps that: orig_rax = -1 hides it while the injected call runs, and the registers
that are put back make the kernel restart it, or not, as it would have.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from cryoci.errors import CheckpointError, UnsupportedError
from cryoci.shim.memory import calls, find
from cryoci.shim.memory.find import Area

_CONT, _GETREGS, _SETREGS, _DETACH, _TO_SYSCALL = 7, 12, 13, 17, 24
_SEIZE, _INTERRUPT, _GETSIGMASK, _SETSIGMASK = 0x4206, 0x4207, 0x420A, 0x420B
_OPTIONS = 1 << 21 | 1  # PTRACE_O_SUSPEND_SECCOMP, PTRACE_O_TRACESYSGOOD
_AT_SYSCALL = 5 | 0x80  # SIGTRAP, as TRACESYSGOOD marks it
_WALL = 0x40000000
_REGISTERS = 27  # struct user_regs_struct (sys/user.h)
RAX, _RDX, _RSI, _RDI, ORIG_RAX, RIP, _CS = 10, 12, 13, 14, 15, 16, 17
_CS64 = 0x33
_MADVISE, _DONTNEED = 28, 4
_SYSCALL = b"\x0f\x05"
_SECONDS = 10.0

Call = tuple[int, int, int, int]
Saved = dict[str, str]  # "registers" and "mask" of a thread, in hex, and where its calls are made: "at"


def drop(pid: int, areas: Sequence[Area], save: Callable[[Saved], None]) -> None:
    """Drop `areas` of a stopped process. `save` must have stored what it is given when it returns.

    Raises UnsupportedError, CheckpointError, OSError; the thread then is as it was.
    """
    wanted = [(_MADVISE, area.start, area.end - area.start, _DONTNEED) for area in areas]
    for area, result in zip(
        areas, make_calls(pid, wanted, save), strict=False
    ):  # none after one that failed
        if result != 0:
            raise CheckpointError(
                f"process {pid} could not give back its memory at {area.start:x}: {os.strerror(-result)}"
            )


def make_calls(
    pid: int, wanted: Sequence[Call], save: Callable[[Saved], None] = lambda saved: None
) -> list[int]:
    """Have a stopped process make system calls (number, three arguments), up to the first that fails.

    Returns their results, negative for an error. Raises as `drop` does.
    """
    at = gadget(pid)
    seize(pid)
    results: list[int] = []
    try:
        saved = _save(pid, at)
        save(saved)
        try:
            for call in wanted:
                if results and results[-1] < 0:
                    break
                results.append(_call(pid, saved, *call))
        finally:
            _put_back(pid, saved)
    finally:
        release(pid)
    return results


def heal(pid: int, saved: Saved) -> None:
    """Put back what `drop` had saved, if the process stands where `drop` had put it. Raises OSError."""
    seize(pid)
    try:
        now, before = registers_of(pid), unpack(saved["registers"])
        at = int(saved["at"], 16)
        if now[RIP] in (at, at + len(_SYSCALL)) and now[_RDX] == _DONTNEED and now != before:
            _put_back(pid, saved)
        else:
            set_mask(pid, bytes.fromhex(saved["mask"]))
    finally:
        release(pid)


class Hold:
    """Keep processes where they are while their freezer is open; they are frozen at both ends."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._held: list[int] = []
        try:
            for pid in pids:
                for thread in find.threads(pid):
                    seize(thread)
                    self._held.append(thread)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of them. Never raises."""
        for thread in self._held:
            release(thread)
        self._held = []


def supported() -> bool:
    """Whether this machine's kind is known here."""
    return os.uname().machine == "x86_64"


def seize(thread: int) -> None:
    """Attach, and wait for the thread to stop. Raises OSError, CheckpointError."""
    calls.ptrace(_SEIZE, thread, None, _OPTIONS)
    try:
        calls.ptrace(_INTERRUPT, thread)
        _wait(thread)
    except BaseException:
        release(thread)
        raise


def release(thread: int) -> None:
    """Let go of it; one that was in a group stop goes back there. Never raises."""
    with suppress(OSError):  # it has died, which ends the tracing too
        calls.ptrace(_DETACH, thread)


def _wait(thread: int) -> int:
    """Wait for a stop; returns the signal that it reports. Raises CheckpointError."""
    end = time.monotonic() + _SECONDS
    while True:
        done, status = os.waitpid(thread, os.WNOHANG | _WALL)
        if done and os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        if done:
            raise CheckpointError(f"process {thread} has ended while its memory was moved")
        if time.monotonic() > end:
            raise CheckpointError(f"process {thread} does not stop within {_SECONDS:g} s")
        time.sleep(0.0002)


def _save(pid: int, at: int) -> Saved:
    registers = registers_of(pid)
    if registers[_CS] != _CS64:
        raise UnsupportedError(
            f"process {pid} runs 32-bit code", hint='set [memory] engine = "criu" for this container'
        )
    return {"registers": pack(registers), "mask": mask_of(pid).hex(), "at": f"{at:x}"}


def _put_back(pid: int, saved: Saved) -> None:
    set_registers(pid, unpack(saved["registers"]))
    set_mask(pid, bytes.fromhex(saved["mask"]))


def _call(pid: int, saved: Saved, number: int, first: int, second: int, third: int) -> int:
    """Have the process make one system call; returns its result, negative for an error."""
    at = int(saved["at"], 16)
    registers = unpack(saved["registers"])
    for place, value in (
        (RIP, at), (RAX, number), (_RDI, first), (_RSI, second), (_RDX, third), (ORIG_RAX, (1 << 64) - 1),
    ):  # fmt: skip
        registers[place] = value
    set_mask(pid, b"\xff" * 8)  # a signal that comes meanwhile waits
    set_registers(pid, registers)
    # Not by a single step: if this program died in the midst of one, its SIGTRAP would kill the process.
    halts = 0
    for _ in range(8):
        calls.ptrace(_TO_SYSCALL, pid)
        halts += _wait(pid) == _AT_SYSCALL  # before the call, and after it
        now = registers_of(pid)
        if halts == 2 and now[RIP] == at + len(_SYSCALL):
            return ctypes.c_long(now[RAX]).value
        if now[RIP] not in (at, at + len(_SYSCALL)):
            break  # else another stop came first, and nothing was run
    raise CheckpointError(f"process {pid} went elsewhere while its memory was dropped")


def registers_of(thread: int) -> list[int]:
    """struct user_regs_struct of a seized thread. Raises OSError."""
    raw = ctypes.create_string_buffer(8 * _REGISTERS)
    calls.ptrace(_GETREGS, thread, None, raw)
    return list(struct.unpack("27Q", raw.raw))


def set_registers(thread: int, registers: Sequence[int]) -> None:
    """Raises OSError."""
    raw = struct.pack("27Q", *registers)
    calls.ptrace(_SETREGS, thread, None, ctypes.create_string_buffer(raw, len(raw)))


def mask_of(thread: int) -> bytes:
    """The signal mask of a seized thread. Raises OSError."""
    mask = ctypes.create_string_buffer(8)
    calls.ptrace(_GETSIGMASK, thread, 8, mask)
    return mask.raw


def set_mask(thread: int, mask: bytes) -> None:
    """Raises OSError."""
    calls.ptrace(_SETSIGMASK, thread, 8, ctypes.create_string_buffer(mask, 8))


def swallow(thread: int, number: int) -> None:
    """Take a signal that is pending from a seized thread, which runs nothing meanwhile; all others wait.

    The caller sets its registers and mask afterwards. Raises OSError, CheckpointError.
    """
    mask = (1 << 64) - 1 - (1 << (number - 1))
    set_mask(thread, mask.to_bytes(8, "little"))
    calls.ptrace(_CONT, thread)
    if _wait(thread) != number:  # stops where the signal would be delivered, and none is
        raise CheckpointError(f"signal {number} of process {thread} cannot be taken away")


def pack(registers: Sequence[int]) -> str:
    """Registers as they stand in a journal."""
    return struct.pack("27Q", *registers).hex()


def unpack(text: str) -> list[int]:
    """The reverse of `pack`. Raises struct.error."""
    return list(struct.unpack("27Q", bytes.fromhex(text)))


def gadget(pid: int) -> int:
    """Address of a system call instruction in the process: in its vDSO, or any code that it has.

    Raises UnsupportedError without one.
    """
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as f:
        lines = [line.split(maxsplit=5) for line in f]
    code = [line for line in lines if line[1][2] == "x" and line[-1].strip() != "[vsyscall]"]
    code.sort(key=lambda line: line[-1].strip() != "[vdso]")
    found = find.search(pid, (_range(line[0]) for line in code), _SYSCALL)
    if found is not None:
        return found
    raise UnsupportedError(f"process {pid} has no system call instruction in its code")


def _range(text: str) -> tuple[int, int]:
    start, end = (int(number, 16) for number in text.split("-"))
    return start, end
