# SPDX-License-Identifier: Apache-2.0
"""Processes that stand still: the CUDA driver waits for ever for an answer of one, even when asked for its state only.

Measured with driver 580 on an H200: cuCheckpointProcessGetState does not return for a process that is stopped by a
signal or frozen by its cgroup, before and after its checkpoint; GetRestoreThreadId does.
"""

from __future__ import annotations

from cryoci.errors import ConflictError

_MOUNT = "/sys/fs/cgroup"


def refuse(pid: int) -> None:
    """Raise ConflictError when the driver would wait for `pid`. One that a tracer holds, as CRIU does, is none."""
    why = _why(pid)
    if why:
        raise ConflictError(
            f"process {pid} is {why}, and the CUDA driver would wait for it for ever",
            hint=f"let it run first: kill -CONT {pid}"
            if why.startswith("stopped")
            else "let it run first: `cryoci unpark` where cryoci has parked it, else resume the container (podman "
            "unpause, ctr task resume, runc resume)",
        )


def _why(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            if f.read().rpartition(b")")[2].split()[0] == b"T":
                return "stopped by a signal"
        with open(f"/proc/{pid}/cgroup") as f:
            groups = [line.rstrip("\n").split(":", 2) for line in f]
    except (OSError, IndexError):
        return ""  # it has ended, which the driver tells
    for number, controllers, path in groups:
        if number == "0" and b"frozen 1" in _read(f"{_MOUNT}{path}/cgroup.events"):
            return "frozen by its cgroup"
        if "freezer" in controllers and _read(f"{_MOUNT}/freezer{path}/freezer.state").strip() == b"FROZEN":
            return "frozen by its cgroup"
    return ""


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return b""
