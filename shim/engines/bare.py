# SPDX-License-Identifier: Apache-2.0
"""Containers of runc and crun themselves, with no engine above."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from cryoci.command import which
from cryoci.errors import ImageError, NotFoundError
from cryoci.files import read_json
from cryoci.shim import paths, record, runtime
from cryoci.shim.engines.container import Container, overlay_at

RUNTIMES = ("runc", "crun")


def find(name: str, root: str | None) -> Container | None:
    """The container `name` of runc or crun under `root` (None: each one's default), or None."""
    if not paths.valid_id(name):
        return None
    for path in _candidates(name, root):
        argv = [path, *(["--root", root] if root else []), "state", name]
        result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
        if result.returncode == 0:
            return _container(path, root, json.loads(result.stdout))
    return None


def _candidates(name: str, root: str | None) -> list[str]:
    known = record.Record(root, name).load()
    if known is not None:
        return [str(known.facts["runtime"])]
    found = []
    for runtime_name in RUNTIMES:
        try:
            found.append(which(runtime_name))
        except NotFoundError:
            continue
    return found


def _container(path: str, root: str | None, state: dict[str, Any]) -> Container:
    bundle = Path(state["bundle"])
    try:
        spec = read_json(bundle / "config.json")
    except (OSError, ValueError) as e:
        raise NotFoundError(
            f"the bundle of container {state['id']} is gone: {bundle / 'config.json'} cannot be read ({e})",
            hint="a container can be checkpointed only while its bundle exists",
        ) from e
    where = spec.get("root", {}).get("path")
    if not isinstance(where, str):
        raise ImageError(f"{bundle / 'config.json'} names no root.path")
    rootfs = Path(os.path.normpath(bundle / where))
    below = runtime.identify(path)
    return Container(
        engine=below.kind,
        id=state["id"],
        name=state["id"],
        runtime=path,
        root=root,
        bundle=bundle,
        rootfs=rootfs,
        overlay=overlay_at(rootfs),
        spec=spec,
        facts={"runtime.name": below.name, "runtime.version": below.text},
        # checkpointctl's ContainerConfig (lib/metadata.go)
        dumps={"config.dump": {"id": state["id"], "name": state["id"], "runtime": below.name}},
        pid=int(state.get("pid", 0)),
    )
