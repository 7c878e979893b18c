# SPDX-License-Identifier: Apache-2.0
"""What nodes leave on the host: their cgroups and disks, how to find them, and how to sweep stale ones."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cryoci.errors import UnsupportedError
from tests.nodes import tree

PREFIX = "cryoci-node-"
DISKS = tree.CACHE / "disk"
RUN = Path("/run")
PLACES = (DISKS, RUN)  # directories of clusters by their id
_CLONE_NEWNET = 0x40000000


def cgroup2() -> Path:
    """Mount point of the host's cgroup2 hierarchy (hybrid ones too). Raises UnsupportedError without."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(mount.split()[4])
    raise UnsupportedError(
        "no cgroup2 file system is mounted on this host", hint="mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    )


def enable_controllers(group: Path) -> None:
    """Pass every controller that cgroup2 has here down to the nodes (none where cgroup v1 holds them)."""
    for directory in (group.parent, group):
        for name in (directory / "cgroup.controllers").read_text().split():
            try:
                (directory / "cgroup.subtree_control").write_text(f"+{name}")
            except OSError:
                pass  # one that cannot be delegated, such as cpu with realtime processes around


def start_time(pid: int) -> int:
    """When a process began, in clock ticks since boot, 0 without it; with the pid this names a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def owned(name: str) -> bool:
    """Whether the process that made the cluster of this id is still there."""
    words = name.split(".")
    return len(words) == 4 and words[1].isdigit() and start_time(int(words[1])) == int(words[2] or -1)


def sweep() -> None:
    """Remove what clusters of dead processes left; their supervisors do it too, unless they were killed."""
    for path in _made(lambda name: not owned(name)):
        if path.parent in PLACES:
            shutil.rmtree(path, ignore_errors=True)
        else:
            remove_cgroup(path)


def remove_cgroup(path: Path) -> None:
    """Kill everything in a cgroup2 subtree and remove it, within 10 s; a missing one is fine."""
    end = time.monotonic() + 10
    while path.is_dir():
        try:
            (path / "cgroup.kill").write_text("1")
        except OSError:
            for pid in members(path):  # cgroup.kill came with Linux 5.14
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        for directory, _, _ in os.walk(path, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                pass  # a process in it is still dying
        if time.monotonic() > end:
            raise UnsupportedError(f"cannot remove cgroup {path}: processes {members(path)} do not die")
        time.sleep(0.005)


def members(path: Path) -> list[int]:
    """Pids in a cgroup2 subtree."""
    pids: list[int] = []
    for directory, _, _ in os.walk(path):
        try:
            pids += [int(p) for p in Path(directory, "cgroup.procs").read_text().split()]
        except OSError:
            pass  # removed while we walk
    return pids


def leftovers(cluster: str | None = None) -> list[str]:
    """What is left of one cluster (by id), or of all whose process is dead: a line for each thing."""

    def wanted(name: str) -> bool:
        return name == cluster if cluster is not None else not owned(name)

    found: list[str] = []
    for path in _made(wanted):
        if path.parent in PLACES:
            found.append(f"directory {path}")
        else:
            found += [f"cgroup {path}", *(f"process {pid} in {path.name}" for pid in members(path))]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if any(w.startswith(PREFIX) and wanted(w) for w in words[:5]):
                found.append(f"process {entry.name}: {' '.join(words)}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if str(tree.CACHE) in line:  # nodes mount in namespaces of their own: none may show here
            found.append(f"mount {line}")
    return found + [
        f"interface {n}" for n in os.listdir("/sys/class/net") if n.startswith(("port", "bridge0"))
    ]


def unshare_network() -> None:
    """Move the calling thread into a new network namespace. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def _made(wanted: Callable[[str], bool]) -> list[Path]:
    """Cgroups and disks of the clusters whose id is wanted."""
    places = [d for d in (cgroup2(), *PLACES) if d.is_dir()]
    return [p for d in places for p in sorted(d.glob(f"{PREFIX}*")) if wanted(p.name)]
