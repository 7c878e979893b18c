# SPDX-License-Identifier: Apache-2.0
"""`cryoci restore`: a checkpoint directory becomes a running container on this node.

The directory is verified but untrusted: whoever made it decides what runs inside the container, never what
this node gives to it (`untrusted`). Whatever a failed restore has made is removed again, last thing first.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

from cryoci.errors import CheckpointError, ImageError, PrivilegeError, RestoreError, UnsupportedError
from cryoci.shim import netns
from cryoci.shim.criu import images
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.criu.probe import probe
from cryoci.shim.engines import restore_bare, restore_podman, streams
from cryoci.shim.engines.container import Container, runtime_argv
from cryoci.shim.engines.options import Restored, RestoreOptions, criu_flags, read_dump


def restore(directory: Path, options: RestoreOptions) -> Restored:
    """Restore the checkpoint in `directory` (checked by ociimage.archive). Raises RestoreError and others."""
    need_root()
    probe()
    own = describe(directory)
    _check_node(own)
    images.check(str(directory / "checkpoint"))
    engine = options.engine or own["engine"]
    criu = CriuOptions.from_mapping(carried(own)).merge(options.criu)
    if engine == "podman":
        return restore_podman.restore(directory, own, options, criu)
    if engine in ("runc", "crun"):
        return restore_bare.restore(directory, own, options, criu)
    raise UnsupportedError(
        f"this checkpoint was made under {engine}, and cryoci restores under podman, runc and crun",
        hint="let the engine restore it: push the image and name it in the container's specification",
    )


def need_root() -> None:
    """Raise PrivilegeError for anybody but root; before the work of fetching an image, too."""
    if os.geteuid() != 0:
        raise PrivilegeError("a restore needs root: CRIU makes processes with given ids", hint="use sudo")


def describe(directory: Path) -> dict[str, Any]:
    """What cryoci.json says; for archives made without cryoci, what can be told from config.dump."""
    own: Any = {}
    if (directory / "cryoci.json").is_file():
        own = read_dump(directory, "cryoci.json")
        if not isinstance(own, dict) or own.get("version") != 1:
            raise ImageError(
                "cryoci.json is of a version that this cryoci does not know", hint="upgrade cryoci"
            )
    spec = read_dump(directory, "spec.dump") if (directory / "spec.dump").is_file() else {}
    noted = spec.get("annotations") if isinstance(spec, dict) else None
    manager = noted.get("io.container.manager") if isinstance(noted, dict) else None
    engine = own.get("engine") or {"libpod": "podman", "cri-o": "cri-o"}.get(str(manager), "unknown")
    facts = own.get("annotations")
    return {**own, "engine": str(engine), "annotations": facts if isinstance(facts, dict) else {}}


def carried(own: dict[str, Any]) -> dict[str, Any]:
    """CRIU options of the dump that a restore must repeat. Paths and plugins of the other node do not count."""
    criu = own.get("criu")
    names = ("tcp-established", "file-locks", "ext-unix-sk", "shell-job")
    return {name: True for name in names if isinstance(criu, dict) and criu.get(name) is True}


def _check_node(own: dict[str, Any]) -> None:
    made_for, here = own["annotations"].get("host.arch"), os.uname().machine
    if isinstance(made_for, str) and made_for and made_for != here:
        raise UnsupportedError(
            f"the checkpoint is of a {made_for} machine and this one is {here}",
            hint="restore it on a node of the same architecture",
        )


def in_place(container: Container, directory: Path, criu: CriuOptions) -> None:
    """Bring back a container that its own checkpoint ended, under the same engine, id and bundle."""
    images = directory / "checkpoint"
    if container.engine == "podman":
        restore_podman.in_place(container, images, criu)
    else:
        argv = runtime_argv(
            container.root,
            "restore",
            "--detach",
            *("--bundle", str(container.bundle), "--image-path", str(images), "--work-path", str(directory)),
            *criu_flags(criu, "restore"),
            container.id,
        )
        # the engine-less container's old pipes are gone with whoever held them
        with streams.lasting(quiet=True) as its:
            result = subprocess.run(argv, stdin=its.stdin, stdout=its.stdout, stderr=its.stderr)
        if result.returncode != 0:
            raise RestoreError(f"command failed with status {result.returncode}: {shlex.join(argv)}")
        netns.raise_loopback(int(container.state()["pid"]))
    if container.status != "running":
        raise CheckpointError(f"container {container.name} is {container.status} after the restore in place")
