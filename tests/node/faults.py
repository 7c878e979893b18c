#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process that holds what CRIU or a GPU's driver cannot dump, for tests of the doctor: run in a container.

faults.py NAME touches /data/NAME when it holds it, and stays.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
kept: list[object] = []


def call(number: int, *arguments: object) -> None:
    assert libc.syscall(number, *arguments) >= 0, os.strerror(ctypes.get_errno())


def ghost() -> None:
    with open("/ghost", "wb") as f:
        kept.append(open(os.dup(f.fileno()), "wb"))  # noqa: SIM115 (it stays open)
        f.truncate(3 << 20)
    os.unlink("/ghost")


def tcp() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    kept.extend((server, socket.create_connection(server.getsockname()), server.accept()))


def maps(*paths: str) -> None:
    """Map files that are called as those of a GPU's driver are."""
    for path in paths:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                f.write(b"\0" * mmap.PAGESIZE)
        fd = os.open(path, os.O_RDWR)
        kept.append(mmap.mmap(fd, mmap.PAGESIZE))
        os.close(fd)


def nccl() -> None:
    """One of two processes with a communicator: its threads have names, its shared memory too."""
    maps("/tmp/libcuda.so.1", "/dev/shm/nccl-doctor")
    for name in (b"NCCL Service", b"NCCL Progress"):
        threading.Thread(target=called, args=(name,), daemon=True).start()


def called(name: bytes) -> None:
    """A thread of this name."""
    libc.prctl(15, name)
    time.sleep(1000)


FAULTS = {
    "io-uring": lambda: call(425, 4, ctypes.create_string_buffer(256)),
    "fds": lambda: call(444, ctypes.byref(ctypes.c_uint64(1)), ctypes.c_size_t(8), 0),  # a Landlock ruleset
    "ghost": ghost,
    "tcp": tcp,
    "sockets": lambda: kept.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)),
    "stdio": lambda: None,  # its caller's
    "namespace": lambda: libc.unshare(0x10000000),
    "traced": lambda: libc.ptrace(0, 0, 0, 0),
    "profiler": lambda: maps("/tmp/libcuda.so.1", "/tmp/libcupti.so.12"),
    "managed": lambda: maps("/dev/nvidia-uvm", "/dev/nvidia-uvm"),
    "nccl": nccl,
    "nccl2": nccl,
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    with open(f"/data/{sys.argv[1]}", "w") as f:
        f.write("ready")
    time.sleep(1000)
