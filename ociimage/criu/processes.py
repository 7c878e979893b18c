# SPDX-License-Identifier: Apache-2.0
"""The processes of a checkpoint: who they were, what they ran as, what they held open, how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryoci.errors import ImageError
from cryoci.ociimage.criu import memory
from cryoci.ociimage.criu.files import Files, OpenFile, Socket
from cryoci.ociimage.criu.image import Images, messages, one
from cryoci.protobuf import Message

MAX_PROCESSES = 100_000
_STATES = {1: "running", 2: "dead", 3: "stopped", 6: "zombie"}  # COMPEL_TASK_* of task-state.h
_MACHINES = {
    1: "x86_64",
    2: "arm",
    3: "aarch64",
    4: "ppc64le",
    5: "s390x",
    6: "mips64",
    7: "loongarch64",
    8: "riscv64",
}
# bits of xstate_bv (Intel SDM, XSAVE-Supported Features) by the flag that /proc/cpuinfo has for them
XSAVE = {
    2: "avx",
    3: "mpx",
    5: "avx512f",
    6: "avx512f",
    7: "avx512f",
    9: "pku",
    17: "amx_tile",
    18: "amx_tile",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: mapped, stored in the checkpoint, and how much of both is shared or files."""

    virtual: int
    stored: int
    heap: int
    areas: int


@dataclass(frozen=True)
class Process:
    """A process; ids are those in the container. `state` is running, stopped, zombie or dead."""

    pid: int
    parent: int
    group: int
    session: int
    threads: tuple[int, ...]
    name: str
    state: str
    machine: str
    uid: int
    gid: int
    capabilities: int
    program: str
    directory: str
    root: str
    root_mode: int
    memory: Memory
    files: tuple[OpenFile, ...]
    sockets: tuple[Socket, ...]
    cpu: tuple[str, ...]


@dataclass(frozen=True)
class Mount:
    """A mount of the container; `external` ones come from the node."""

    id: int
    parent: int
    place: str
    source: str
    type: str
    options: str
    external: bool


@dataclass(frozen=True)
class Statistics:
    """What CRIU measured at the dump: microseconds and pages."""

    freezing_time: int
    frozen_time: int
    memdump_time: int
    memwrite_time: int
    pages_scanned: int
    pages_skipped_parent: int
    pages_written: int


def read(images: Images) -> list[Process]:
    """All processes, parents before children. Raises ImageError for images that are damaged."""
    name = "checkpoint/pstree.img"
    if name not in images.names():
        return []
    files = Files(images)
    found: dict[int, Process] = {}
    for entry in messages(images.read(name), "pstree", name):
        process = _process(images, files, entry)
        if process.pid in found:
            raise ImageError(f"{name} is damaged: it has process {process.pid} twice")
        found[process.pid] = process
        if len(found) > MAX_PROCESSES:
            raise ImageError(f"{name} holds over {MAX_PROCESSES} processes")
    return list(found.values())


def children(processes: Sequence[Process]) -> dict[int, list[Process]]:
    """Processes by their parent's pid; roots, and those of parents that are not there, are under 0."""
    known = {process.pid for process in processes}
    result: dict[int, list[Process]] = {}
    for process in processes:
        parent = process.parent if process.parent in known and process.parent != process.pid else 0
        result.setdefault(parent, []).append(process)
    return result


def _process(images: Images, files: Files, entry: Message) -> Process:
    pid = entry.number(1)
    core = one(images, f"checkpoint/core-{pid}.img", "core")
    task = core.message(3)
    creds = core.message(5).message(10)
    ids = (
        one(images, f"checkpoint/ids-{pid}.img", "ids")
        if f"checkpoint/ids-{pid}.img" in images.names()
        else (core.message(4))
    )
    places = one(images, f"checkpoint/fs-{pid}.img", "fs")
    opened, sockets = files.table(ids.number(2))
    mapped = memory.layout(images, pid)
    stored = sum(run.count for run in memory.runs(images, pid)) * memory.PAGE
    effective = creds.numbers(11)
    return Process(
        pid,
        entry.number(2),
        entry.number(3),
        entry.number(4),
        tuple(entry.numbers(5)),
        task.text(6),
        _STATES.get(task.number(1), f"state {task.number(1)}"),
        _MACHINES.get(core.number(1), ""),
        creds.number(1),
        creds.number(2),
        sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(effective[:2])),
        files.path(mapped.program_id),
        files.path(places.number(1)),
        files.path(places.number(2)),
        files.mode(places.number(2)),
        Memory(mapped.virtual, stored, mapped.heap, len(mapped.areas)),
        tuple(opened),
        tuple(sockets),
        _cpu(core),
    )


def _cpu(core: Message) -> tuple[str, ...]:
    """Processor features whose registers the process has in use, which another processor must have."""
    used = core.message(2).message(3).message(13).number(1)
    return tuple(sorted({flag for bit, flag in XSAVE.items() if used >> bit & 1}))


def mounts(images: Images) -> list[Mount]:
    """The mounts of the container's mount namespaces, in the order of the dump."""
    result = []
    for name in sorted(images.names()):
        if name.startswith("checkpoint/mountpoints-"):
            for mount in messages(images.read(name), "mountpoints", name):
                result.append(
                    Mount(
                        mount.number(2),
                        mount.number(4),
                        mount.text(7).removeprefix("."),
                        mount.text(8),
                        mount.text(14) or _FS.get(mount.number(1), f"type {mount.number(1)}"),
                        mount.text(9),
                        bool(mount.number(13)) or 18 in mount,
                    )
                )
    return result


_FS = dict(
    enumerate(
        "unknown proc sysfs devtmpfs binfmt_misc tmpfs devpts simfs pstore securityfs fusectl debugfs cgroup aufs "
        "mqueue fuse auto overlay autofs tracefs".split()
    )
) | {23: "cgroup2"}


def statistics(images: Images) -> Statistics | None:
    """What CRIU measured, when the checkpoint brings it."""
    if "stats-dump" not in images.names():
        return None
    dump = next(messages(images.read("stats-dump"), "stats", "stats-dump"), Message(b"")).message(1)
    return Statistics(*(dump.number(i) for i in range(1, 8)))


def hostname(images: Images) -> str:
    """The container's host name; empty when it shared the node's."""
    for name in sorted(images.names()):
        if name.startswith("checkpoint/utsns-"):
            return one(images, name, "utsns").text(1)
    return ""
