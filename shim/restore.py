# SPDX-License-Identifier: Apache-2.0
"""`restore`: edit the bundle for this node, run the real runtime, and undo all of it when that fails."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cryoci.errors import CryociError, PrivilegeError
from cryoci.files import read_json
from cryoci.shim import (
    bundle,
    cgroup,
    checkpoint,
    child,
    config,
    create,
    criu_root,
    crun,
    failure,
    handover,
    operation,
    state,
    underlying,
)
from cryoci.shim.argv import Invocation, parse, with_flag
from cryoci.shim.criu import conf, images, rootmode
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.criu.probe import probe
from cryoci.shim.gpu import amd
from cryoci.shim.memory import verbs
from cryoci.shim.paths import valid_id
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime, identify

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryoci.shim.gpu.restoring import Restoring

GPU_DUMP = "gpu.dump"


def main(line: Invocation, launcher: str, *, extra: str = "") -> int:
    """Restore a container; returns the runtime's exit status (the container's, without `--detach`).

    `extra` are more lines for CRIU's configuration, of this restore alone.

    Raises PrivilegeError, NotFoundError, UnsupportedError, ConfigError, SpaceError, ImageError.
    """
    path = underlying.recorded(line.root, line.id, launcher) or choose(line, launcher)
    below = identify(path)
    line = parse(line.argv, below.kind)
    if line.doubt or not valid_id(line.id) or line.asks_help:
        underlying.execute(path, line.argv)
    if os.geteuid() != 0:
        raise PrivilegeError(
            "restore needs root: CRIU makes processes with given ids", hint="run it as root"
        )
    criu = probe()
    record = Record(line.root, line.id or "")
    chosen = operation.options(line, below, record)
    operation.make_work_directory(line)
    known = record.exists
    directory, handed = handover.take(operation.image_directory(line), create.spec_path(line))
    if directory != operation.image_directory(line):
        line = parse(with_flag(line, "image-path", directory), below.kind)
    chosen = chosen.merge(CriuOptions.from_mapping(handed, where="cryoci restore:"))
    if os.path.isdir(operation.image_directory(line)) and not line.has("lazy-pages"):
        images.check(operation.image_directory(line))
    variables: dict[bytes, bytes] = {}
    settings = config.load().amd
    render_nodes = amd.compare(operation.image_directory(line), settings)
    if render_nodes is not None:
        chosen = dataclasses.replace(chosen, libdir=amd.check(chosen.libdir, criu.path))
        variables = amd.variables(settings)
    extra += rootmode.lines(operation.image_directory(line), create.spec_path(line))
    text = conf.render(chosen, "restore") + extra
    made = create.prepare(line, below, text, operation.image_directory(line))
    if made is None:  # no bundle to edit: the runtime says so
        underlying.execute(path, line.argv)
        return 1
    edit = made[1]
    status = 1
    criu_root.sweep(below.kind, line.root, record.id, str(made[0].facts["bundle"]))
    try:
        with provided(line, edit, render_nodes):
            status = attempt(line, below, made[0], edit, chosen, variables, extra)
        if status == 0 and below.kind == "crun" and line.has("detach"):
            gather(line, below)
            confine(line, below, edit.spec)
    finally:
        if status != 0:
            if below.kind == "crun":
                crun.sweep(below, line.root, record.id, edit.spec)
            edit.undo()
            if not known:
                record.remove()
        elif extra:
            conf.write(record.conf, chosen, "dump")
    return status


def attempt(
    line: Invocation,
    below: Runtime,
    record: Record,
    edit: bundle.Edit,
    chosen: CriuOptions,
    variables: dict[bytes, bytes],
    extra: str,
) -> int:
    """Run the runtime below on a prepared bundle, and bring CUDA back; when the runtime fails, say why.

    `variables` are for the runtime, `extra` lines for CRIU's configuration.
    """
    explained = False
    with gpus(line, below, record, edit) as gpu:
        if gpu is not None:
            line, chosen = gpu.prepare(line, chosen)
            state.write(record.conf, (conf.render(chosen, "restore") + extra).encode())
        reads_conf = bundle.points_to(edit.spec, record.conf) and below.reads_annotation
        env = {**operation.environment(record, reads_conf=reads_conf), **variables}
        if gpu is not None:
            env.update(gpu.variables())
        if not line.has("detach") and (record.facts.get("devices") or {}).get("stale"):
            failure.say(
                line,
                "the container keeps the other node's device nodes, as a foreground restore cannot exchange them",
                "restore it with --detach",
                level="warning",
            )

        def act(used: Invocation) -> int:
            nonlocal explained
            argv = operation.words(used, below, chosen, reads_conf=reads_conf)
            status, explained = operation.run(used, argv, below, record, "restore", env)
            if status == 0 and line.has("detach"):
                settle_devices(line, below, record)
            return status

        status = verbs.restore(line, below, record, act)
        if gpu is not None:
            status = gpu.finish(status)
    if status != 0 and explained:
        other = made_by(operation.image_directory(line))
        if other and other != below.name:
            failure.say(
                line,
                f"the checkpoint was made by {other}, and {below.name} was asked to restore it",
                f"restore it with {other}: set [runtime] path",
            )
    return status


def gpus(
    line: Invocation, below: Runtime, record: Record, edit: bundle.Edit
) -> AbstractContextManager[Restoring | None]:
    """The GPU part of a restore; of none for a checkpoint without gpu.dump."""
    if not os.path.lexists(f"{operation.image_directory(line)}/{GPU_DUMP}"):
        return nullcontext()
    from cryoci.shim.gpu.restoring import restoring

    return restoring(line, below, record, edit.spec, images=operation.image_directory(line))


def provided(
    line: Invocation, edit: bundle.Edit, render_nodes: dict[str, str] | None
) -> AbstractContextManager[object]:
    """This node's AMD render nodes in the checkpoint's /dev; nothing for one without AMD GPUs."""
    if not render_nodes:
        return nullcontext()
    from cryoci.shim.gpu import amd_nodes

    return amd_nodes.provided(operation.image_directory(line), edit.spec, render_nodes)


def gather(line: Invocation, below: Runtime) -> None:
    """Bring processes that crun has left in our cgroup into the container's."""
    try:
        cgroup.gather(pid_of(line, below))
    except (OSError, ValueError, KeyError, CryociError) as e:
        failure.say(line, f"processes of {line.id} may be outside of its cgroup: {e}", level="warning")


def settle_devices(line: Invocation, below: Runtime, record: Record) -> None:
    """Make this node's devices in the restored container's /dev, or remove it: it would not run on.

    Raises RestoreError and what `pid_of` raises.
    """
    devices = record.facts.get("devices")
    if not devices:
        return
    from cryoci.shim.devices.settle import settle

    try:
        settle(pid_of(line, below), devices)
    except BaseException:
        child.run(below.path, operation.delete_words(line, below), tied=False)
        raise


def pid_of(line: Invocation, below: Runtime) -> int:
    """Pid of the container's first process. Raises OSError, ValueError, KeyError or a CryociError."""
    from cryoci.command import run

    named = line.options.get("pid-file")
    if named:
        with open(named) as f:
            return int(f.read())
    root = ["--root", line.root] if line.root else []
    return int(json.loads(run([below.path, *root, "state", line.id or ""]).stdout)["pid"])


def confine(line: Invocation, below: Runtime, spec: dict[str, Any]) -> None:
    """Have later `exec` filtered as before."""
    try:
        crun.filter_exec(below, line.root, line.id or "", spec)
    except (OSError, CryociError) as e:
        failure.say(line, f"exec in {line.id} will have no seccomp filter: {e}", level="warning")


def choose(line: Invocation, launcher: str) -> str:
    """The runtime for a container that is new here: the one that made the checkpoint, if it is installed.

    Their images differ (criu-root, devices), so one's are not the other's. The checkpoint, which is not
    trusted, only picks between runc and crun of this node. Raises ConfigError, NotFoundError.
    """
    path = underlying.configured(launcher)
    maker = made_by(operation.image_directory(line))
    if maker in underlying.DEFAULTS and maker != identify(path).name:
        return underlying.search(maker, launcher) or path
    return path


def made_by(directory: str) -> str | None:
    """Name of the runtime that made the checkpoint in `directory`, if it says so."""
    try:
        value = read_json(f"{directory}/{checkpoint.FACTS}")
        return str(value["runtime"])[:64]
    except (OSError, ValueError, KeyError, TypeError):
        return None
