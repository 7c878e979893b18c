# SPDX-License-Identifier: Apache-2.0
"""Engines: whose container a name is."""

from __future__ import annotations

import os

from cryoci.errors import NotFoundError, PrivilegeError
from cryoci.shim.engines import bare, podman
from cryoci.shim.engines.container import Container


def need_root() -> None:
    """Raise PrivilegeError for anybody but root."""
    if os.geteuid() != 0:
        raise PrivilegeError("this needs root: it is about other users' processes", hint="use sudo")


def find(name: str, *, root: str | None = None) -> Container:
    """The container called `name`: podman's, or one of bare runc or crun under `root`.

    With `root` only bare ones are looked for. Raises NotFoundError, PrivilegeError.
    """
    need_root()
    found = podman.find(name) if root is None else None
    found = found or bare.find(name, root)
    if found is None:
        looked = "podman, runc and crun" if root is None else f"runc and crun under {root}"
        raise NotFoundError(
            f"no container {name} is known to {looked}",
            hint="see `podman ps`, `runc list` or `crun list`; for another runtime root give --runtime-root",
        )
    return found
