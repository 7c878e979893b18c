# SPDX-License-Identifier: Apache-2.0
"""What tells from outside that a process shares GPU memory with others.

Drivers before 610 checkpoint such processes and then cannot restore them, for good: "operation not supported" or
"invalid argument" (seen on an H200 with driver 580; docs/gpu.md). So they have to be told before.
"""

from __future__ import annotations

import os
import re
import struct

# PyTorch's counts of who uses a CUDA tensor that was sent to another process, 8 bytes each, behind a header: shared
# memory of the sender (torch/csrc/CudaIPCTypes.h, CUDA_IPC_REF_COUNTER_FILE_SIZE; aten/src/ATen/MapAllocator.cpp).
_COUNTERS = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) rw-s .*?/dev/shm/torch_", re.MULTILINE)
_HEADER, _COUNTS = 64, 8 * 10_000
_MAPPED = 80 << 10  # in pages


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


def tensors(pid: int, proc: str = "/proc") -> int:
    """How many CUDA tensors that the process has sent to others by PyTorch are in use there."""
    found = 0
    for first, last in _COUNTERS.findall(_read(f"{proc}/{pid}/maps")):
        start = int(first, 16)
        if int(last, 16) - start == _MAPPED:
            counts = _read(f"{proc}/{pid}/mem", start + _HEADER, _COUNTS)
            found += sum(count > 0 for (count,) in struct.iter_unpack("q", counts[: len(counts) // 8 * 8]))
    return found


def _read(path: str, at: int = 0, size: int = -1) -> bytes:
    try:
        with open(path, "rb", buffering=0) as f:
            f.seek(at)
            return (f.read(size) if size >= 0 else f.readall()) or b""
    except OSError:
        return b""


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
