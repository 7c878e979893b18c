# SPDX-License-Identifier: Apache-2.0
"""What a check finds, and where it looks.

A check is a function of `Facts` that returns one `Check`. Everything it knows of the node comes through `Facts`: files
below a root, programs on a PATH, and system calls by name. So a test can put any node in front of it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warn", "fail", "skip"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SCHEMA = "io.cryoci.doctor/1"


@dataclass(frozen=True)
class Check:
    """`tested` is the question, `found` the answer in a sentence, `fix` what to do unless all is well."""

    id: str
    tested: str
    verdict: Verdict
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Said:
    """What a program said: its exit status, and stdout and stderr together."""

    status: int
    text: str


class Facts:
    """The node. `root` stands before every path; `calls` replaces system calls, which return 0 or an errno."""

    def __init__(
        self,
        root: str | os.PathLike[str] = "/",
        path: str | None = None,
        calls: Mapping[str, Callable[[], int]] | None = None,
        machine: str | None = None,
    ) -> None:
        self.root = Path(root)
        self.path = path if path is not None else f"{os.environ.get('PATH', '')}:{PATH}"
        self.calls = {**CALLS, **(calls or {})}
        self.machine = machine or platform.machine()
        self.release = platform.release() if os.fspath(root) == "/" else ""

    def at(self, path: str) -> Path:
        """`path` below the root."""
        return self.root / path.lstrip("/")

    def read(self, path: str, limit: int = 4 << 20) -> str | None:
        """A text file, or None when it cannot be read."""
        try:
            with self.at(path).open("rb") as f:
                return f.read(limit).decode(errors="replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.at(path))

    def names(self, directory: str) -> list[str]:
        """Sorted names in a directory; none when it is not there."""
        try:
            return sorted(os.listdir(self.at(directory)))
        except OSError:
            return []

    def link(self, path: str) -> str:
        """What a symbolic link says; "" when it cannot be read."""
        try:
            return os.readlink(self.at(path))
        except OSError:
            return ""

    def socket(self, path: str) -> str:
        """What the kernel calls the protocol of the socket that `path` in /proc leads to; "" when it does not say."""
        try:
            return os.getxattr(self.at(path), "system.sockprotoname").rstrip(b"\0").decode(errors="replace")
        except OSError:
            return ""

    def program(self, name: str) -> str | None:
        """Path of a program on PATH, or None."""
        return shutil.which(name, path=self.path)

    def run(self, *argv: str, timeout: float = 20) -> Said | None:
        """Run a program of PATH; None when there is none or it gives no answer within `timeout` seconds."""
        path = self.program(argv[0])
        if path is None:
            return None
        try:
            result = subprocess.run(
                [path, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env={**os.environ, "PATH": self.path, "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return Said(result.returncode, result.stdout.decode(errors="replace"))

    def call(self, name: str) -> int:
        """Try a system call: 0 when the kernel has it and lets us, else an errno."""
        return self.calls[name]()

    @property
    def kernel(self) -> tuple[int, int]:
        """Major and minor version of the kernel; (0, 0) when unknown."""
        match = re.match(r"(\d+)\.(\d+)", self.read("/proc/sys/kernel/osrelease") or self.release)
        return (int(match[1]), int(match[2])) if match else (0, 0)


_NUMBERS = {"x86_64": {"kcmp": 312, "userfaultfd": 323}, "aarch64": {"kcmp": 272, "userfaultfd": 282}}


def _syscall(name: str, *arguments: int) -> int:
    number = _NUMBERS.get(platform.machine(), {}).get(name)
    if number is None:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments))
    if result < 0:
        return ctypes.get_errno()
    if name == "userfaultfd":
        os.close(result)
    return 0


def _kcmp() -> int:
    return _syscall("kcmp", os.getpid(), os.getpid(), 1, 0, 0)  # KCMP_VM


def _userfaultfd() -> int:
    return _syscall("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)


def _process_vm() -> int:
    """process_vm_readv of ourselves: how memory is captured in parallel."""
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = ctypes.create_string_buffer(b"x" * 8), ctypes.create_string_buffer(8)
    read = struct.pack("PN", ctypes.addressof(source), 8)
    write = struct.pack("PN", ctypes.addressof(target), 8)
    done = libc.process_vm_readv(
        os.getpid(), write, ctypes.c_ulong(1), read, ctypes.c_ulong(1), ctypes.c_ulong(0)
    )
    return 0 if done == 8 and target.raw == source.raw[:8] else ctypes.get_errno() or errno.EIO


def _soft_dirty() -> int:
    """Bit 55 of a page just written, in /proc/self/pagemap: CONFIG_MEM_SOFT_DIRTY."""
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page[0] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            with open("/proc/self/pagemap", "rb", buffering=0) as f:
                f.seek(address // mmap.PAGESIZE * 8)
                entry: int = struct.unpack("Q", f.read(8))[0]
    except BufferError:
        return 0
    except OSError as e:
        return e.errno or errno.EIO
    return 0 if entry >> 55 & 1 else errno.EOPNOTSUPP


def _custom_storage() -> int:
    """The driver's checkpoint functions that let their caller move the bytes (r615)."""
    from cryoci.errors import CryociError
    from cryoci.shim.gpu.cuda import Driver

    try:
        return 0 if Driver().custom_storage else errno.ENOSYS
    except CryociError:
        return errno.ENODEV


CALLS: dict[str, Callable[[], int]] = {
    "kcmp": _kcmp,
    "userfaultfd": _userfaultfd,
    "process_vm_readv": _process_vm,
    "soft-dirty": _soft_dirty,
    "cuda-custom-storage": _custom_storage,
}
