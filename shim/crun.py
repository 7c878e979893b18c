# SPDX-License-Identifier: Apache-2.0
"""What crun leaves undone in a restore (seen in 1.21): seccomp of `exec`, and the traces of a failure."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cryoci.command import run
from cryoci.files import scratch
from cryoci.shim import cgroup, paths
from cryoci.shim.runtime import Runtime

_FILTER = "seccomp.bpf"


def directory(root: str | None, container: str) -> Path:
    """Where crun keeps the container's state (libcrun/status.c, get_run_directory)."""
    if root is None:
        own = paths.environment("XDG_RUNTIME_DIR", "")
        root = own + "/crun" if own else "/run/crun"
    return Path(root, container)


def filter_exec(below: Runtime, root: str | None, container: str, spec: dict[str, Any]) -> None:
    """Give `exec` in a restored container its seccomp filter, without which it would run unconfined.

    crun compiles the filter on create only, and exec takes a missing one for none. So a container that never
    starts is created from the same profile, and its filter is the restored one's. Raises ToolError, OSError.
    """
    profile = (spec.get("linux") or {}).get("seccomp")
    wanted = directory(root, container) / _FILTER
    if not profile or wanted.exists():
        return
    with scratch("seccomp.") as place:
        for name in ("rootfs/dev", "rootfs/proc"):
            (place / name).mkdir(parents=True)
        (place / "rootfs/init").touch(0o755)
        twin = {
            "ociVersion": "1.0.2",
            "process": {"args": ["/init"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}], "seccomp": profile},
        }
        (place / "config.json").write_text(json.dumps(twin))
        crun = [below.path, "--root", str(place / "state"), "--cgroup-manager", "disabled"]
        null = subprocess.DEVNULL  # its process keeps them open, so a pipe would have no end
        run([*crun, "create", "--bundle", str(place), "twin"], stdout=null, stderr=null)
        try:
            made = place / "state/twin" / _FILTER
            if made.exists():  # a profile that allows everything has none
                shutil.copyfile(made, wanted)
                wanted.chmod(0o700)
        finally:
            run([*crun, "delete", "--force", "twin"], check=False)


def sweep(below: Runtime, root: str | None, container: str, spec: dict[str, Any]) -> None:
    """Remove what a failed restore leaves: an empty cgroup, and a container without status, over which `list`
    stumbles."""
    state = directory(root, container)
    if state.is_dir() and not (state / "status").exists():
        words = ["--root", root] if root else []
        run([below.path, *words, "delete", "--force", container], check=False)
        cgroup.remove(str((spec.get("linux") or {}).get("cgroupsPath") or ""))
