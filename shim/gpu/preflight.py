# SPDX-License-Identifier: Apache-2.0
"""Refusals before a GPU checkpoint touches anything, each with its cause and what to do.

What the driver cannot do, it often notices in the middle, hangs on, or reports as success (docs/gpu.md has the
sources). Here it is looked for first.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryoci.errors import ConflictError, SpaceError, UnsupportedError
from cryoci.shim import cgroup
from cryoci.shim.gpu import coupled
from cryoci.shim.gpu import tasks as processes
from cryoci.shim.gpu.cuda import Driver
from cryoci.shim.gpu.nvml import Gpu, Nvml
from cryoci.shim.gpu.tasks import Task
from cryoci.shim.hostmemory import available_memory as available_memory
from cryoci.shim.memory.placement import in_memory

_JOBS = 590  # forked children, by cuda-checkpoint --launch-job
_IPC = 610  # legacy CUDA IPC, and so NCCL between processes, within a job
_MARGIN = 1.1  # host memory beyond the bytes on the GPUs, for the driver's own


def check(nvml: Nvml, driver: Driver, init: int, tasks: Sequence[Task], gpus: Sequence[Gpu]) -> None:
    """Raise UnsupportedError or ConflictError when these processes cannot be checkpointed."""
    branch = int(nvml.driver.split(".")[0])
    for gpu in gpus:
        if gpu.mig:
            raise UnsupportedError(
                f"{gpu.uuid} ({gpu.name}) is split by MIG, and the driver cannot checkpoint on it",
                hint="turn MIG off on that GPU, or use another one",
            )
    mps = nvml.used_by(mps=True)
    for task in tasks:
        if task.pid in mps:
            raise UnsupportedError(
                f"process {task.pid} ({task.comm}) is a client of an MPS server, which the driver cannot checkpoint",
                hint="start the container without MPS (CUDA_MPS_PIPE_DIRECTORY)",
            )
        if tracer := next((tracer for _, tracer in processes.threads(task.pid) if tracer), 0):
            raise ConflictError(
                f"process {task.pid} ({task.comm}) is traced by process {tracer}", hint="detach the debugger"
            )
        if processes.managed(task.pid):
            raise UnsupportedError(
                f"process {task.pid} ({task.comm}) uses managed (UVM) memory, which driver {nvml.driver} cannot "
                "checkpoint",
                hint="allocate with cudaMalloc instead of cudaMallocManaged",
            )
    if len(tasks) > 1 and branch < _IPC:
        _check_sharing(nvml.driver, tasks)
    known = {task.pid for task in tasks}
    for pid in processes.members(init):
        held = processes.open_devices(pid) if pid not in known else []
        if held:
            raise UnsupportedError(
                f"process {pid} ({processes.look(pid).comm}) holds {held[0]} but is no CUDA process of its own: "
                "it was forked from one",
                hint="start such children by spawn or forkserver (PyTorch DataLoader: "
                f"multiprocessing_context='forkserver', or num_workers=0), or use driver {_JOBS} with "
                "cuda-checkpoint --launch-job",
            )


def _check_sharing(driver: str, tasks: Sequence[Task]) -> None:
    speaking = [task.pid for task in tasks if coupled.nccl(task.pid)]
    if speaking:
        raise UnsupportedError(
            f"processes {', '.join(map(str, speaking))} speak NCCL with each other, and driver {driver} could not "
            "restore them",
            hint=f"install driver {_IPC} or newer, or destroy the process group before the checkpoint",
        )
    for task in tasks:
        if count := coupled.tensors(task.pid):
            raise UnsupportedError(
                f"process {task.pid} ({task.comm}) has sent PyTorch tensors on a GPU to others, which use {count} of "
                f"them (CUDA IPC), and driver {driver} could not restore those",
                hint=f"install driver {_IPC} or newer, or delete what came from another process first",
            )


def check_host_memory(init: int, tasks: Sequence[Task], images: str | None) -> None:
    """Raise SpaceError unless the memory of the GPUs fits into that of this node, and of the container.

    With `images` (a directory) on a file system that is memory it is needed there once more.
    """
    need = host_memory(tasks)
    available = available_memory()
    if images is not None and in_memory(images):
        if need * 2 > available:
            raise SpaceError(
                f"the container holds {vram(tasks) >> 20} MiB on its GPUs, which go to memory and then to {images}, "
                f"which is memory too; {available >> 20} MiB are free",
                hint="put the checkpoint on a disk (-o DIR, or TMPDIR)",
            )
    elif need > available:
        raise SpaceError(
            f"the container holds {vram(tasks) >> 20} MiB on its GPUs, and this node has {available >> 20} MiB of "
            "memory free",
            hint="free host memory: the driver brings all of it there first",
        )
    room = cgroup.memory_left(init)
    if room is not None and need > room:
        raise SpaceError(
            f"the container holds {vram(tasks) >> 20} MiB on its GPUs, and its memory limit leaves {room >> 20} MiB: "
            "the kernel would kill it in the middle",
            hint="raise its memory limit by what it holds on its GPUs (podman update --memory)",
        )


def host_memory(tasks: Sequence[Task]) -> int:
    """Bytes of host memory that what `tasks` hold on GPUs takes on its way."""
    return int(vram(tasks) * _MARGIN)


def vram(tasks: Sequence[Task]) -> int:
    """Bytes on all GPUs."""
    return sum(sum(task.vram.values()) for task in tasks)


def flags(tasks: Sequence[Task]) -> dict[str, bool]:
    """What a restore elsewhere, or a person who reads the image, may want to know."""
    return {
        "nccl": any(coupled.nccl(task.pid) for task in tasks),
        "uvm": any(processes.managed(task.pid) for task in tasks),
        "ipc": any(coupled.tensors(task.pid) for task in tasks),
        "job": any("CUDA_CHECKPOINT_JOB_FILE" in processes.environment(task.pid) for task in tasks),
    }


def seen(nvml: Nvml, init: int) -> list[Gpu]:
    """The GPUs that the container sees, ordered as this node counts them: by its /dev, else all."""
    visible = set(processes.minors(init))
    gpus = nvml.gpus()
    return [gpu for gpu in gpus if gpu.minor in visible] or gpus
