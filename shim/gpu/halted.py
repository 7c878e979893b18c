# SPDX-License-Identifier: Apache-2.0
"""Processes that stand still: the CUDA driver waits for ever for an answer of one, even when asked for its state only.

Measured with driver 580 on an H200: cuCheckpointProcessGetState does not return for a process that is stopped by a
signal or frozen by its cgroup, before and after its checkpoint; GetRestoreThreadId does.
"""

from __future__ import annotations

from cryoci.errors import ConflictError
from cryoci.shim import cgroup


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
        if cgroup.frozen(cgroup.path_of(pid)):
            return "frozen by its cgroup"
        with open(f"/proc/{pid}/cgroup") as f:
            groups = [line.rstrip("\n").split(":", 2) for line in f]
        for _, controllers, path in groups:
            if "freezer" in controllers and _frozen(path):
                return "frozen by its cgroup"
    except (OSError, IndexError):
        pass  # it has ended, which the driver tells
    return ""


def _frozen(path: str) -> bool:
    """Version 1 (freezer-subsystem.rst)."""
    try:
        with open(f"/sys/fs/cgroup/freezer{path}/freezer.state") as f:
            return f.read().strip() == "FROZEN"
    except OSError:
        return False
