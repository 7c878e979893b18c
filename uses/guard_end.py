# SPDX-License-Identifier: Apache-2.0
"""How a container has ended: by a crash, which a guard makes up for, or by somebody's will, which it obeys."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryoci.command import run
from cryoci.errors import CryociError
from cryoci.files import read_json
from cryoci.shim import record
from cryoci.shim.engines import podman, processes
from cryoci.shim.engines.container import Container

How = Literal["crashed", "finished", "stopped", "removed", "moved", "restarted"]
_SETTLE = 10.0  # seconds that an engine may take to notice
_PIDFD_GET_INFO = (
    (3 << 30) | (64 << 16) | (0xFF << 8) | 11
)  # _IOWR(0xFF, 11, struct pidfd_info), linux/pidfd.h
_PIDFD_INFO_EXIT = 1 << 3


@dataclass(frozen=True)
class End:
    """`detail` says more for people: the signal, or the exit code."""

    how: How
    detail: str = ""


def end(container: Container, pid: int, pidfd: int) -> End:
    """How `container`, whose first process `pid` is gone, has ended."""
    # at once: this mark of a `cryoci checkpoint` that ends the container goes when it is done
    if _being_moved(container):
        return End("moved", "by a checkpoint that ended it")
    return _podman(container, pid) if container.engine == "podman" else _bare(container, pidfd)


def _being_moved(container: Container) -> bool:
    try:
        held = read_json(Path(record.Record(container.root, container.id).directory) / processes.HELD)
        return Path(f"/proc/{int(held['pid'])}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _podman(container: Container, pid: int) -> End:
    deadline = time.monotonic() + _SETTLE
    while True:
        asked = run(["podman", "container", "inspect", "--", container.id], check=False)
        if asked.returncode != 0:
            return End("removed")
        inspected = json.loads(asked.stdout)[0]
        state = inspected["State"]
        if state["Status"] == "running" and state["Pid"] not in (0, pid):
            return End("restarted")
        over = state["Status"] in ("exited", "stopped") and not _comes_back(container, inspected)
        if over or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    code = int(state.get("ExitCode", 0))
    if podman.stopped_by_user(container.id):
        return End("stopped", "by its user")
    if code == 0 and state["Status"] in ("exited", "stopped"):
        return End("finished", "with exit code 0")
    return End("crashed", "out of memory" if state.get("OOMKilled") else f"with exit code {code}")


def _comes_back(container: Container, inspected: dict[str, Any]) -> bool:
    """Will podman start it again, by its restart policy? (Not when retries are used up: that shows after a while.)"""
    policy = str((inspected["HostConfig"].get("RestartPolicy") or {}).get("Name") or "no")
    failed = policy == "on-failure" and int(inspected["State"].get("ExitCode", 0)) != 0
    return (failed or policy in ("always", "unless-stopped")) and not podman.stopped_by_user(container.id)


def _bare(container: Container, pidfd: int) -> End:
    status = _status(pidfd)
    try:
        if container.status in ("running", "paused"):
            return End("restarted")
    except CryociError:
        return End("removed")
    if status is None:
        return End("crashed", "and nobody knows how")
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return End("finished", "with exit code 0")
    return End("crashed", f"with exit code {code}" if code > 0 else f"by signal {-code}")


def _status(pidfd: int) -> int | None:
    """The wait status of a process that is no child (Linux 6.15); None where the kernel does not tell."""
    deadline = time.monotonic() + 1
    while pidfd >= 0 and time.monotonic() < deadline:
        info = bytearray(struct.pack("=Q56x", _PIDFD_INFO_EXIT))
        try:
            fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        except OSError:
            pass  # not reaped yet, or an older kernel
        else:
            if struct.unpack_from("=Q", info)[0] & _PIDFD_INFO_EXIT:
                return int(struct.unpack_from("=i", info, 60)[0])
        time.sleep(0.02)
    return None
