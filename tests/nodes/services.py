# SPDX-License-Identifier: Apache-2.0
"""Real services for tests of checkpoints: redis.

`Cluster.start(shown=services.shown())` has a node see a container's root directory at ROOTFS: Debian packages,
unpacked only (so no /etc/alternatives). It is no layer of the node's own overlay, as files that are mapped through
two overlays have no mount that CRIU could find.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from pathlib import Path
from typing import Any

from tests.nodes import tree
from tests.nodes.node import Node

ROOTFS = "/opt/services/rootfs"
PACKAGES = ("base-files", "bash", "coreutils", "dash", "libc-bin", "redis-server")


@functools.cache
def rootfs() -> Path:
    """The container's root directory on the host (54 MB, 15 s to make)."""
    name = f"services-{tree.digest([tree.SUITE, *PACKAGES, inspect.getsource(fill)])}"
    return tree.cached(name, fill)


def shown() -> dict[str, Path]:
    """What a node with services is to see."""
    return {ROOTFS: rootfs()}


def fill(root: Path) -> None:
    """Make the container's root directory at `root`."""
    tree.mmdebstrap(root, PACKAGES, variant="extract")
    (root / "data").mkdir()


def bundle(node: Node, destination: str, argv: tuple[str, ...]) -> None:
    """Make a bundle that runs `argv` at `destination`, in the network of the node; its root is an overlay."""
    script = f"""
        mkdir -p "$1/rootfs" "$1/upper" "$1/work" && cd "$1"
        mount -t overlay overlay -o "lowerdir={ROOTFS},upperdir=$1/upper,workdir=$1/work" rootfs
        runc spec && cat config.json
    """
    config: dict[str, Any] = json.loads(node.run(["/bin/sh", "-euc", script, "sh", destination]).stdout)
    config["process"].update(terminal=False, args=list(argv), cwd="/")
    config["root"]["readonly"] = False
    linux = config["linux"]
    linux.pop("resources", None)  # cgroup2 may have no controllers in a node
    linux["cgroupsPath"] = f"/{os.path.basename(destination)}"
    linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "network"]
    node.write(f"{destination}/config.json", json.dumps(config, indent=1))
