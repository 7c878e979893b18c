# SPDX-License-Identifier: Apache-2.0
"""Stand a program of x86-64 still where it is about to write certain words, as a debugger would."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PEEK_USER, _DETACH, _SYSCALL, _SEIZE, _INTERRUPT = 3, 17, 24, 0x4206, 0x4207
_GOOD = 1  # PTRACE_O_TRACESYSGOOD
_NUMBER, _SECOND, _THIRD = 15 * 8, 13 * 8, 12 * 8  # orig_rax, rsi, rdx in user_regs_struct
_WRITE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(what: int, pid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result = int(_libc.ptrace(what, pid, address, data))
    if code := ctypes.get_errno():
        raise OSError(code, os.strerror(code))
    return result


def _finish(pid: int) -> None:
    """From the entry of a system call to its end."""
    _ptrace(_SYSCALL, pid)
    os.waitpid(pid, 0x40000000)


@contextmanager
def about_to_write(pid: int, words: bytes, times: int = 1) -> Iterator[None]:
    """The block runs while `pid`, which was stopped, stands before the write of `words` number `times`."""
    _ptrace(_SEIZE, pid, 0, _GOOD)
    _ptrace(_INTERRUPT, pid)
    os.kill(pid, signal.SIGCONT)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        while True:
            _, status = os.waitpid(pid, 0x40000000)  # __WALL
            assert os.WIFSTOPPED(status), "it has ended before"
            number = os.WSTOPSIG(status)
            if number == signal.SIGTRAP | 0x80 and _ptrace(_PEEK_USER, pid, _NUMBER) == _WRITE:
                size = min(_ptrace(_PEEK_USER, pid, _THIRD), 4096)
                times -= words in os.pread(memory, size, _ptrace(_PEEK_USER, pid, _SECOND))
                if times == 0:
                    break
                _finish(pid)
            own = number in (signal.SIGTRAP, signal.SIGTRAP | 0x80, signal.SIGSTOP, signal.SIGCONT)
            _ptrace(_SYSCALL, pid, 0, 0 if own or status >> 16 else number)
        yield
    finally:
        os.close(memory)
        _ptrace(_DETACH, pid)
