# SPDX-License-Identifier: Apache-2.0
"""What an engine or kubelet gives each of its containers, given by cryoci where another restores one.

CRIU wants every mount of the dump back, and a network namespace that the engine had made. Contents are this node's
(resolv.conf) or empty: an archive holds none of them, and those of the other node would mean nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryoci.command import run, which
from cryoci.shim import paths

# The kubelet's, which podman does not make: a file and directories.
_LOG = "/dev/termination-log"
KUBELETS = frozenset(
    {_LOG, *(f"{run}/secrets/kubernetes.io/serviceaccount" for run in ("/run", "/var/run"))}
)
_FILES = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", _LOG})
_SHM = "/dev/shm"
PLACES = _FILES | KUBELETS | {_SHM, "/run/secrets"}
_NETWORK = "netns"  # a file of the bundle


def provide(bundle: Path, spec: dict[str, Any], asked: Mapping[str, Any], undo: ExitStack) -> None:
    """Make what `spec` mounts at PLACES below `bundle`, and a network namespace when `asked` had its engine's.

    `spec` is the clean copy of `asked`, which tells what was there. `undo` gets what takes it back. Raises OSError,
    ToolError, NotFoundError.
    """
    hostname = str(spec.get("hostname") or "localhost")
    texts = {
        "/etc/hosts": f"127.0.0.1 localhost {hostname}\n::1 localhost\n",
        "/etc/hostname": f"{hostname}\n",
    }
    own = bundle / "mounts"
    for mount in spec["mounts"]:
        place = mount["destination"]
        if place not in PLACES or mount.get("type") not in ("bind", None):
            continue
        source = own / place.strip("/").replace("/", "-")
        own.mkdir(mode=0o755, exist_ok=True)
        if place not in _FILES:
            source.mkdir(exist_ok=True)
            source.chmod(0o1777 if place == _SHM else 0o755)
        elif place == "/etc/resolv.conf" and os.path.exists(place):
            source.write_bytes(Path(place).read_bytes())
        else:
            source.write_text(texts.get(place, ""))
        mount["source"] = str(source)
    if _joined(asked):
        _make_network(bundle, spec, undo)


def stand_in(spec: dict[str, Any]) -> None:
    """Have podman mount something that is there, and empty, at KUBELETS. Raises OSError."""
    for mount in spec["mounts"]:
        if mount["destination"] not in KUBELETS or mount.get("type") not in ("bind", None):
            continue
        if mount["destination"] == _LOG:
            mount["source"] = os.devnull
        else:
            os.makedirs(paths.empty_directory(), mode=0o555, exist_ok=True)
            mount["source"] = paths.empty_directory()


def release(bundle: str | os.PathLike[str]) -> None:
    """Undo the mount of `provide` in a bundle that is to be removed. Never raises."""
    path = os.path.join(bundle, _NETWORK)
    if os.path.exists(path):
        run([which("umount"), "--lazy", "--", path], check=False)


def _joined(asked: Mapping[str, Any]) -> bool:
    """Did it run in a network namespace that its engine had made?"""
    found = (asked.get("linux") or {}).get("namespaces") or ()
    return any(one.get("type") == "network" and one.get("path") for one in found)


def _make_network(bundle: Path, spec: dict[str, Any], undo: ExitStack) -> None:
    path = bundle / _NETWORK
    path.touch(mode=0o600)
    run([which("unshare", package="util-linux"), f"--net={path}", "true"])
    undo.callback(release, bundle)
    for one in spec["linux"]["namespaces"]:
        if one["type"] == "network":
            one["path"] = str(path)
