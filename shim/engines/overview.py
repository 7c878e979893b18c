# SPDX-License-Identifier: Apache-2.0
"""The containers of this node, with what each holds on GPUs and in host memory: `cryoci ps`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cryoci.command import run
from cryoci.errors import CryociError, NotFoundError
from cryoci.shim import record
from cryoci.shim.engines import podman, processes
from cryoci.shim.engines.container import state_argv
from cryoci.shim.gpu import hold, nvml, tasks


@dataclass(frozen=True)
class Row:
    """One container. `state` is running, paused or parked; `vram` bytes on GPUs now, `host` bytes of memory."""

    name: str
    id: str
    engine: str
    state: str
    pid: int
    vram: int
    host: int
    gpus: tuple[str, ...]


def rows() -> list[Row]:
    """Every container that runs, is paused or parked, by name. Raises nothing for what has just ended."""
    try:
        with nvml.opened() as management:
            used = management.used_by()
    except CryociError:
        used = {}  # a node without NVIDIA's driver
    found = [_row(known, used) for known in _containers()]
    return sorted((row for row in found if row is not None), key=lambda row: (row.name, row.id))


def _row(known: dict[str, Any], used: dict[int, dict[str, int]]) -> Row | None:
    pid = known["pid"]
    if pid <= 0 or known["status"] not in ("running", "paused"):
        return None
    here = tasks.held(pid, used)
    state = known["status"]
    gpus = {uuid for uuid, amount in here.items() if amount}
    try:
        left = hold.load(known["record"])
    except CryociError:
        left = None
    if left is not None and left.parked and state == "paused":
        state = "parked"
        gpus |= {uuid for task in left.dump.tasks for uuid, amount in task.vram.items() if amount}
    return Row(
        known["name"],
        known["id"],
        known["engine"],
        state,
        pid,
        sum(here.values()),
        processes.private_memory(pid),
        tuple(sorted(gpus)),
    )


def _containers() -> Iterator[dict[str, Any]]:
    seen = set()
    if podman.installed():
        listed = run(
            [
                "podman",
                "ps",
                "--filter=status=running",
                "--filter=status=paused",
                "--format=json",
                "--no-trunc",
            ]
        )
        for one in json.loads(listed.stdout or b"[]"):
            seen.add(one["Id"])
            yield {
                "name": one["Names"][0],
                "id": one["Id"],
                "engine": "podman",
                "status": one["State"],
                "pid": int(one["Pid"]),
                "record": record.Record(None, one["Id"]),
            }
    for known in record.all_records():
        if known.id in seen:
            continue
        root = known.facts.get("root")
        try:
            asked = run(state_argv(root, known.id, str(known.facts.get("runtime", ""))), check=False)
        except NotFoundError:
            continue  # its runtime was uninstalled
        if asked.returncode == 0:
            state = json.loads(asked.stdout)
            yield {
                "name": known.id,
                "id": known.id,
                "engine": str(known.facts.get("runtime_name", "")),
                "status": state.get("status"),
                "pid": int(state.get("pid", 0)),
                "record": known,
            }
