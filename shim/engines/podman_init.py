# SPDX-License-Identifier: Apache-2.0
"""`podman run --init`: process 1 is catatonit, a program of the node, which podman mounts into the container.

A restored container gets this node's. CRIU compares its build with that of the checkpoint, so it has to be the same
version. Where podman looks: containers.conf(5), `init_path`; containers/common pkg/config, FindInitBinary.
"""

from __future__ import annotations

from typing import Any

from cryoci.errors import NotFoundError
from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup import read

PLACES = frozenset({"/run/podman-init", "/dev/init"})  # since podman 4.0, and before
_NAME = "catatonit"
_DIRECTORIES = (
    "/usr/local/libexec/podman",
    "/usr/local/lib/podman",
    "/usr/libexec/podman",
    "/usr/lib/podman",
)


def settle(spec: dict[str, Any], facts: Facts) -> None:
    """Mount this node's init, read-only, where `spec` has one. Raises NotFoundError, ConfigError."""
    for mount in spec["mounts"]:
        if mount["destination"] in PLACES:
            options = [o for o in mount.get("options") or ["bind"] if o not in ("rw", "ro")]
            mount.update(type="bind", source=find(facts), options=[*options, "ro"])


def find(facts: Facts) -> str:
    """This node's init. Raises NotFoundError, and ConfigError for a containers.conf that is broken."""
    config = read.podman(facts)
    # "engine" is its older place
    found = [read.table(config, name).get("init_path") for name in ("containers", "engine")]
    named = next((path for path in found if path), None)
    if isinstance(named, str):
        places = [named]
    else:
        places = [*(f"{directory}/{_NAME}" for directory in _DIRECTORIES), facts.program(_NAME) or ""]
    for path in places:
        if path and facts.exists(path):
            return path
    raise NotFoundError(
        f"the container's process 1 is podman's init, and this node has no {named or _NAME}",
        hint="install the same version of it as on the first node: apt-get install catatonit",
    )
