# SPDX-License-Identifier: Apache-2.0
"""Debian's kubectl, for tests of what is a plugin of it: package kubernetes-client of trixie, unpacked on the host."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from pathlib import Path

from cryoci.errors import NotFoundError
from tests.nodes import tree

PACKAGES = ("kubernetes-client",)


@functools.cache
def program() -> str:
    """A kubectl that runs on this host: Debian's for root, else one that is installed. Raises NotFoundError."""
    if os.geteuid() == 0:
        return str(package() / "usr/bin/kubectl")
    found = shutil.which("kubectl")
    if found is None:
        raise NotFoundError("no kubectl here", hint="as root, tests unpack Debian's under .cache/")
    return found


def package() -> Path:
    """The package and its libraries (91 MB, 78 of them kubectl; 8 s to make)."""
    name = f"kubectl-{tree.digest([tree.SUITE, *PACKAGES, inspect.getsource(fill)])}"
    return tree.cached(name, fill)


def fill(root: Path) -> None:
    """Unpack it at `root`."""
    tree.mmdebstrap(root, PACKAGES, variant="extract")
