# SPDX-License-Identifier: Apache-2.0
"""CRIU's own reader of images, crit, for tests of images that others are to read.

`Cluster.start(shown=crit.shown())` has a node see Debian's package, of the same CRIU as the node's, at PLACE.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

from tests.nodes import tree
from tests.nodes.node import Node

PLACE = "/opt/crit/rootfs"
PACKAGES = (f"python3-pycriu/{tree.NEXT_SUITE}",)


@functools.cache
def package() -> Path:
    """The package and what it needs, unpacked on the host (73 MB, 15 s to make)."""
    name = f"crit-{tree.digest([tree.SUITE, *PACKAGES, inspect.getsource(fill)])}"
    return tree.cached(name, fill)


def shown() -> dict[str, Path]:
    """What a node with crit is to see."""
    return {PLACE: package()}


def fill(root: Path) -> None:
    """Unpack it at `root`."""
    tree.mmdebstrap(root, PACKAGES, variant="extract")


def crit(node: Node, *words: str) -> str:
    """What `crit WORDS` prints."""
    argv = ["python3", f"{PLACE}/usr/bin/crit", *words]
    env = {
        "PYTHONPATH": f"{PLACE}/usr/lib/python3/dist-packages",
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",  # the other needs a library that nodes lack
    }
    return node.run(argv, env=env).stdout.decode()


def decoded(node: Node, path: str) -> list[dict[str, Any]]:
    """The entries of an image."""
    found: dict[str, list[dict[str, Any]]] = json.loads(crit(node, "decode", "-i", path))
    return found["entries"]
