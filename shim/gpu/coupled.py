# SPDX-License-Identifier: Apache-2.0
"""What tells from outside that a process shares GPU memory with others.

Drivers before 610 checkpoint such processes and then cannot restore them, for good: "operation not supported" or
"invalid argument" (seen on an H200 with driver 580; docs/gpu.md). So they have to be told before.
"""

from __future__ import annotations

import os
import re

# mm: address range, permissions, then the file. 10,000 counters of 8 bytes and 64 of a header: PyTorch's counts of
# who uses a CUDA tensor that was sent to another process (torch/csrc/CudaIPCTypes.h, CUDA_IPC_REF_COUNTER_FILE_SIZE).
_COUNTERS = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) rw-s .*?(/dev/shm/torch_\S+)", re.MULTILINE)
_COUNTERS_SIZE = 80 << 10


def nccl(pid: int, proc: str = "/proc") -> bool:
    """Has the process a communicator of NCCL with other processes?

    Such a one has an abstract socket for handles of memory (NCCL, src/misc/ipcsocket.cc), shared files, or
    threads with names if it was asked to name them (src/proxy.cc).
    """
    if b"/dev/shm/nccl-" in _read(f"{proc}/{pid}/maps"):
        return True
    for tid in _names(f"{proc}/{pid}/task"):
        if _read(f"{proc}/{pid}/task/{tid}/comm").startswith(b"NCCL "):
            return True
    sockets = {
        line.split()[6]
        for line in _read(f"{proc}/{pid}/net/unix").splitlines()
        if line.rpartition(b" ")[2].startswith(b"@tmp/nccl-socket-")
    }
    if not sockets:
        return False
    for fd in _names(f"{proc}/{pid}/fd"):
        try:
            target = os.readlink(f"{proc}/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1].encode() in sockets:
            return True
    return False


def tensors(pid: int, proc: str = "/proc") -> set[bytes]:
    """Files by which PyTorch counts the users of CUDA tensors that this process has sent or received."""
    return {
        name
        for start, end, name in _COUNTERS.findall(_read(f"{proc}/{pid}/maps"))
        if int(end, 16) - int(start, 16) == _COUNTERS_SIZE
    }


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return b""


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
