# SPDX-License-Identifier: Apache-2.0
"""A running container's GPU use: what of it the CUDA driver does not checkpoint, seen from outside."""

from __future__ import annotations

from cryoci.shim.doctor import container, gpus
from cryoci.shim.doctor.check import Check
from cryoci.shim.doctor.container import Subject
from cryoci.shim.gpu import coupled

_JOB = 610  # first branch that checkpoints CUDA IPC, within a job (NVIDIA/cuda-checkpoint#56)
_NONE = "no process uses CUDA"


def users(subject: Subject) -> list[int]:
    """The processes that use CUDA, by what they map."""
    return subject.mapping("libcuda.so", "/dev/nvidia")


def programs(subject: Subject) -> Check:
    """Other programs in the process that hold the GPU's state."""
    name, tested = "container.gpu", "processes use of the GPU only what its driver checkpoints"
    found = users(subject)
    if not found:
        return Check(name, tested, "skip", _NONE)
    if subject.mapping("libcupti", "libnvperf", "cuda-gdb"):
        fix = "run it without profilers and debuggers (NVIDIA/cuda-checkpoint#15)"
        return Check(name, tested, "fail", "a profiler (CUPTI) is loaded", fix)
    if subject.mapping("/dev/infiniband"):
        fix = "set NCCL_IB_DISABLE=1, and tear down RDMA first"
        return Check(name, tested, "fail", "RDMA memory is mapped", fix)
    if len(found) > 1:
        fix = "let cryoci lock all of them first (it does); CRIU's own plugin may hang before CRIU 4.3"
        return Check(name, tested, "warn", f"{len(found)} processes use CUDA", fix)
    return Check(name, tested, "ok", f"process {found[0]}")


def managed(subject: Subject) -> Check:
    """Each context maps /dev/nvidia-uvm once; each range of managed memory once more (H100, driver 580)."""
    name, tested = "container.gpu-managed", "no process has managed (UVM) memory"
    if not users(subject):
        return Check(name, tested, "skip", _NONE)
    for pid, text in subject.maps.items():
        ranges = sum(line.endswith("/dev/nvidia-uvm") for line in text.splitlines()) - 1
        if ranges > 0:
            fix = (
                "allocate with cudaMalloc instead of cudaMallocManaged: no driver checkpoints managed memory"
            )
            return Check(name, tested, "fail", f"process {pid} has {ranges} ranges of it", fix)
    return Check(name, tested, "ok", "none")


def shared(subject: Subject) -> Check:
    """GPU memory that processes share (shim/gpu/coupled.py).

    A program's own cuIpcOpenMemHandle leaves no trace outside of it (looked for on an H200, driver 580).
    """
    name, tested = "container.gpu-ipc", "processes do not share GPU memory (NCCL, CUDA IPC)"
    found = users(subject)
    if not found:
        return Check(name, tested, "skip", _NONE)
    if len(found) == 1:
        return Check(name, tested, "ok", "one process")
    version = gpus.driver_version(subject.facts)
    job = version is not None and int(version.split(".")[0]) >= _JOB
    proc = str(subject.facts.at("/proc"))
    speaking = [pid for pid in found if coupled.nccl(pid, proc)]
    if speaking:
        fix = (
            "start them as one job (cuda-checkpoint --launch-job), with NCCL_CUMEM_ENABLE=0 and NCCL_NVLS_ENABLE=0"
            if job
            else f"install driver {_JOB} or newer, or destroy the process group before the checkpoint"
        )
        who = ", ".join(map(str, speaking))
        return Check(
            name, tested, "warn" if job else "fail", f"processes {who} speak NCCL with each other", fix
        )
    for pid in found:
        if count := coupled.tensors(pid, proc):
            fix = f"delete tensors that came from other processes first, or use driver {_JOB} and one job"
            said = f"others use {count} PyTorch tensors of process {pid} on a GPU"
            return Check(name, tested, "warn" if job else "fail", said, fix)
    return Check(name, tested, "ok", f"{len(found)} processes, no sign of it")


CHECKS = (programs, managed, shared)


def examine(subject: Subject) -> list[Check]:
    """Every check of a container, in order."""
    return [check(subject) for check in (*container.CHECKS, *CHECKS)]
