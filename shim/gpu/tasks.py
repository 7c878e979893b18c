# SPDX-License-Identifier: Apache-2.0
"""The CUDA processes of a container, and what /proc tells about them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cryoci.shim import cgroup
from cryoci.shim.gpu.cuda import Driver

_NVIDIA = ("/dev/nvidia", "/dev/nvhost", "/dev/dri/")


@dataclass
class Task:
    """One CUDA process. `inner` is its pid in its innermost namespace; `vram` bytes by UUID of the GPU.

    `start` is its start time in clock ticks since boot, which together with `pid` names it for good.
    """

    pid: int
    start: int
    inner: int
    comm: str
    vram: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As it stands in gpu.dump."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Task:
        """Raises ValueError, KeyError, TypeError for what is no task."""
        vram = {str(uuid): int(used) for uuid, used in dict(value["vram"]).items()}
        return cls(
            int(value["pid"]), int(value["start"]), int(value["inner"]), str(value["comm"])[:64], vram
        )

    @property
    def alive(self) -> bool:
        """Is it still this process, and no zombie?"""
        stat = _stat(self.pid)
        return stat is not None and stat[1] == self.start and stat[0] not in "ZX"


def look(pid: int) -> Task:
    """The facts about a process. Raises ProcessLookupError when it is gone."""
    stat = _stat(pid)
    if stat is None:
        raise ProcessLookupError(f"no process {pid}")
    inner = pid
    for line in _lines(f"/proc/{pid}/status"):
        if line.startswith("NSpid:"):
            inner = int(line.split()[-1])
    comm = "".join(_lines(f"/proc/{pid}/comm")).strip()
    return Task(pid, stat[1], inner, comm)


def cuda(driver: Driver, init: int, used: Mapping[int, dict[str, int]] | None = None) -> list[Task]:
    """The CUDA processes of the container whose first process is `init`, with `used` (nvml.used_by) of each.

    Raises CudaError.

    The driver is asked only about processes that have its library mapped, which every CUDA process has.
    """
    found = []
    for pid in members(init):
        if maps_library(pid) and driver.restore_thread(pid) is not None:
            try:
                task = look(pid)
            except ProcessLookupError:
                continue  # it ended meanwhile
            task.vram = (used or {}).get(pid, {})
            found.append(task)
    return found


def any_cuda(init: int) -> bool:
    """Has a process of the container the driver's library? Cheap, and needs no driver."""
    return any(maps_library(pid) for pid in members(init))


def members(init: int) -> list[int]:
    """Every process of a container: the descendants of `init`, and who else is in its cgroup and pid namespace."""
    found = dict.fromkeys(cgroup.tree(init))
    namespace = _namespace(init)
    for pid in cgroup.processes(init):
        if pid not in found and namespace is not None and _namespace(pid) == namespace:
            found[pid] = None
    return list(found)


def held(init: int, used: Mapping[int, Mapping[str, int]]) -> dict[str, int]:
    """Bytes that the container of `init` holds on each GPU, by UUID, of what is `used` (nvml.used_by)."""
    total: dict[str, int] = {}
    for pid in members(init):
        for uuid, amount in used.get(pid, {}).items():
            total[uuid] = total.get(uuid, 0) + amount
    return total


def maps_library(pid: int) -> bool:
    """Has `pid` mapped libcuda.so, whatever its version and path?"""
    try:
        with open(f"/proc/{pid}/maps", "rb") as f:
            return b"/libcuda.so" in f.read()
    except OSError:
        return False


def managed(pid: int) -> bool:
    """Has `pid` managed memory? Every context has one mapping of /dev/nvidia-uvm; ranges of such memory are more."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as f:
            return f.read().count(b"/dev/nvidia-uvm\n") > 1
    except OSError:
        return False


def open_devices(pid: int) -> list[str]:
    """GPU device files that `pid` holds open."""
    found = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if target.startswith(_NVIDIA):
                found.add(target)
    except OSError:
        pass
    return sorted(found)


def threads(pid: int) -> list[tuple[str, int]]:
    """(name, pid of its tracer or 0) of every thread."""
    found = []
    try:
        for tid in os.listdir(f"/proc/{pid}/task"):
            name, tracer = "", 0
            for line in _lines(f"/proc/{pid}/task/{tid}/status"):
                if line.startswith("Name:"):
                    name = line[5:].strip()
                elif line.startswith("TracerPid:"):
                    tracer = int(line.split()[1])
            found.append((name, tracer))
    except OSError:
        pass
    return found


def environment(pid: int) -> Mapping[str, str]:
    """The environment that a process was started with."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            words = f.read().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def minors(pid: int) -> list[int]:
    """N of the /dev/nvidiaN that `pid` can see, which are the GPUs that its driver has counted."""
    try:
        names = os.listdir(f"/proc/{pid}/root/dev")
    except OSError:
        return []
    return sorted(int(name[6:]) for name in names if name.startswith("nvidia") and name[6:].isdecimal())


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time) of a process (proc_pid_stat(5)); None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _namespace(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _lines(path: str) -> list[str]:
    try:
        with open(path, errors="replace") as f:
            return f.readlines()
    except OSError:
        return []
