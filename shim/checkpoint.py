# SPDX-License-Identifier: Apache-2.0
"""`checkpoint`: refuse early, run the real runtime, and look at what it left."""

import dataclasses
import hashlib
import json
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cryoci.errors import CheckpointError, PrivilegeError
from cryoci.files import write_json
from cryoci.shim import config, create, failure, operation, underlying
from cryoci.shim.argv import Invocation, parse
from cryoci.shim.bundle import ORIGINAL
from cryoci.shim.criu import conf, cpuinfo
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.criu.probe import CriuVersion, probe
from cryoci.shim.devices import inject
from cryoci.shim.gpu import amd, kfd, plugin
from cryoci.shim.gpu.dumping import Dumping, dumping
from cryoci.shim.memory import verbs
from cryoci.shim.paths import valid_id
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime, identify

FACTS = "cryoci-runtime.json"  # beside the CRIU images, which CRIU does not mind


def main(line: Invocation, launcher: str) -> int:
    """Checkpoint a container; returns the runtime's exit status.

    Raises PrivilegeError, NotFoundError, UnsupportedError (criu), ConfigError, and CheckpointError when the
    runtime reports success but left no image.
    """
    path = underlying.recorded(line.root, line.id, launcher) or underlying.configured(launcher)
    below = identify(path)
    line = parse(line.argv, below.kind)
    if line.doubt or not valid_id(line.id) or line.asks_help or line.has("pre-dump"):
        underlying.execute(path, line.argv)
    if os.geteuid() != 0:
        raise PrivilegeError(
            "checkpoint needs root: CRIU reads other processes' memory", hint="run it as root"
        )
    criu = probe()
    record = Record(line.root, line.id or "")
    facts = record.facts if record.load() else {}
    chosen = operation.options(line, below, record)
    topology, extra = None, {}
    if amd.uses(devices_of(facts)):
        chosen = dataclasses.replace(chosen, libdir=amd.check(chosen.libdir, criu.path))
        topology, extra = kfd.capture(), amd.variables(config.load().amd)
    try:
        record.make()
        conf.write(record.conf, chosen, "dump")
    except OSError as e:
        raise create.storage_error(record, e) from e
    operation.make_work_directory(line)
    reads_conf = bool(facts.get("annotated")) and below.reads_annotation
    directory = operation.image_directory(line)
    with _gpus(line, below, record, directory, criu, chosen) as gpu:
        chosen = gpu.options(chosen)
        conf.write(record.conf, chosen, "dump")
        argv = operation.words(line, below, chosen, reads_conf=reads_conf)
        env = {**operation.environment(record, reads_conf=reads_conf), **gpu.variables(), **extra}
        status = verbs.checkpoint(
            line,
            below,
            record,
            lambda: operation.run(line, argv, below, record, "dump", env)[0],
            by_criu="CRIU's CUDA plugin needs it in its place" if gpu.in_criu else "",
        )
    if status == 0:
        if not os.path.isfile(directory + "/inventory.img"):
            raise CheckpointError(
                f"{path} reports success, but {directory} holds no inventory.img: there is no checkpoint",
                hint=f"see CRIU's log: {record.log('dump')}",
            )
        cpuinfo.dump(criu.path, directory)
        try:
            write_json(f"{directory}/{FACTS}", describe(below, criu, facts))
            if topology:
                write_json(f"{directory}/{amd.TOPOLOGY}", topology)
        except OSError as e:
            failure.say(line, f"cannot write cryoci's files to {directory}: {e.strerror}", level="warning")
    return status


def _gpus(
    line: Invocation, below: Runtime, record: Record, directory: str, criu: CriuVersion, chosen: CriuOptions
) -> AbstractContextManager[Dumping | plugin.PluginDumping]:
    settings = config.load().gpu
    if settings.engine == "none":
        return nullcontext(Dumping(None))
    if settings.engine == "plugin":
        timeout = settings.lock_timeout
        return plugin.dumping(line, below, record, chosen, images=directory, timeout=timeout, criu=criu)
    return dumping(line, below, record, images=directory, settings=settings, criu=criu.version)


def devices_of(facts: dict[str, Any]) -> Any:
    """What was put into the container: what cryoci wrote down, else what its specification shows."""
    if facts.get("devices"):
        return facts["devices"]
    try:
        with open(str(facts.get("spec") or ""), "rb") as f:
            return inject.found(json.load(f))
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None


def describe(below: Runtime, criu: CriuVersion, facts: dict[str, object]) -> dict[str, object]:
    """Facts that a restore elsewhere may want: tools, kernel, what cryoci had edited in the spec."""
    system = os.uname()
    spec = str(facts.get("spec") or "")
    digest = None
    for candidate in (spec + ORIGINAL, spec):
        try:
            with open(candidate, "rb") as f:
                digest = "sha256:" + hashlib.sha256(f.read()).hexdigest()
            break
        except OSError:
            continue
    return {
        "version": 1,
        "runtime": below.name,
        "runtime_version": below.text,
        "criu_version": criu.version,
        "kernel": system.release,
        "arch": system.machine,
        "edits": facts.get("edits", []),
        "spec_digest": digest,
        "devices": devices_of(facts),
    }
