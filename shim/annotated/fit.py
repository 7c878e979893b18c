# SPDX-License-Identifier: Apache-2.0
"""Does a checkpoint fit the container that its engine is creating?

CRIU brings back processes with the mounts, terminal and namespaces that they had; what those lead to outside
of the container is the new one's. Where the two differ in kind CRIU fails deep inside, or a mount that the
engine promises would silently not be there: so it is refused before anything is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryoci.errors import ImageError, RestoreError, UnsupportedError
from cryoci.files import read_json
from cryoci.shim.annotated.fetch import Checkpoint

Spec = Mapping[str, Any]

# Files that engines put into each container, or do not; the application does not ask for them.
ENGINES_OWN = frozenset(
    {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/run/secrets", "/dev/shm"}
    | {"/var/run/.containerenv", "/dev/termination-log", "/var/run/secrets/kubernetes.io/serviceaccount"}
    | {"/run/podman-init", "/dev/init", "/sys/fs/cgroup"}
)


def check(spec: Spec, checkpoint: Checkpoint, bundle: str) -> None:
    """Raise RestoreError, UnsupportedError or ImageError, with the reason, when it does not fit.

    `spec` is the new container's config.json in `bundle`.
    """
    old = read_spec(checkpoint.directory)
    _check_machine(checkpoint.facts)
    _check_base(checkpoint.facts, base_image(spec, bundle))
    _check_terminal(old, spec)
    if "user" in (namespaces(spec) | namespaces(old)):
        raise UnsupportedError(
            "CRIU cannot restore a container with a user namespace: it loses the right to read its own images",
            hint="create it without one (no --userns, --uidmap; in Kubernetes, hostUsers: true)",
        )
    for kind in ("network", "pid"):
        _check_namespace(kind, old, spec)
    _check_mounts(old, spec)


def read_spec(directory: Path) -> dict[str, Any]:
    """spec.dump of a checkpoint. Raises ImageError."""
    try:
        with open(directory / "spec.dump", "rb") as f:
            value = json.load(f)
    except FileNotFoundError as e:
        raise ImageError("the checkpoint has no spec.dump, so nobody can tell what it needs") from e
    except (ValueError, RecursionError) as e:
        raise ImageError(f"spec.dump of the checkpoint is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise ImageError("spec.dump of the checkpoint is not an OCI runtime specification")
    return value


def base_image(spec: Spec, bundle: str) -> str | None:
    """Id (64 digits) or digest (sha256:...) of the new container's image, where its engine tells.

    CRI-O and containerd write it into annotations; podman into its storage's list, beside the bundle.
    """
    noted = _dict(spec.get("annotations"))
    for key in ("io.kubernetes.cri-o.ImageRef", "io.kubernetes.cri.image-name"):
        text = noted.get(key)
        if isinstance(text, str) and text:
            return text.rpartition("@")[2] if "@sha256:" in text else text if _is_id(text) else None
    userdata = Path(os.path.realpath(bundle))
    try:
        listed = read_json(userdata.parent.parent / "containers.json")
        return next(str(one["image"]) for one in listed if one.get("id") == userdata.parent.name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None


def _is_id(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdef" for c in text)


def _check_machine(facts: Mapping[str, str]) -> None:
    made_for, here = facts.get("host.arch"), os.uname().machine
    if made_for and made_for != here:
        raise UnsupportedError(
            f"the checkpoint is of a {made_for} machine and this one is {here}",
            hint="restore it on a node of the same architecture",
        )


def _check_base(facts: Mapping[str, str], here: str | None) -> None:
    key = "image.digest" if here and here.startswith("sha256:") else "image.id"
    theirs = facts.get(key)
    if here and theirs and theirs != here:
        name = facts.get("image.reference") or facts.get("image.name") or theirs
        raise RestoreError(
            f"the container's image is {here[:19]}, and the checkpoint was made on {theirs[:19]}",
            hint=f"create it from the same image: {name}",
        )


def _check_terminal(old: Spec, new: Spec) -> None:
    was, now = (bool(_dict(spec.get("process")).get("terminal")) for spec in (old, new))
    if was != now:
        raise RestoreError(
            f"the checkpoint's processes have {'a' if was else 'no'} terminal, and the container gets "
            f"{'one' if now else 'none'}",
            hint="create it with a terminal too (--tty)"
            if was
            else "create it without a terminal (no --tty)",
        )


def namespaces(spec: Spec) -> set[str]:
    """Kinds of namespaces that are not the node's."""
    return {str(one.get("type")) for one in _list(_dict(spec.get("linux")).get("namespaces"))}


def _namespace(kind: str, spec: Spec) -> str:
    """host (none of its own), own, or joined (a path)."""
    for one in _list(_dict(spec.get("linux")).get("namespaces")):
        if one.get("type") == kind:
            return "joined" if one.get("path") else "own"
    return "host"


_MEANING = {
    "host": "the node's",
    "own": "one that the runtime makes",
    "joined": "one that the engine made",
}


def _check_namespace(kind: str, old: Spec, new: Spec) -> None:
    was, now = _namespace(kind, old), _namespace(kind, new)
    if was == now:
        return
    raise RestoreError(
        f"the checkpoint's {kind} namespace was {_MEANING[was]}, and the container gets {_MEANING[now]}",
        hint=f"create it with the same kind of {kind} namespace",
    )


def binds(spec: Spec) -> dict[str, dict[str, Any]]:
    """Bind mounts by destination."""
    found = {}
    for mount in _list(spec.get("mounts")):
        options = mount.get("options") or []
        where = mount.get("destination")
        if isinstance(where, str) and (
            mount.get("type") == "bind" or "bind" in options or "rbind" in options
        ):
            found[os.path.normpath(where)] = mount
    return found


def _destinations(spec: Spec) -> set[str]:
    return {os.path.normpath(str(mount.get("destination"))) for mount in _list(spec.get("mounts"))}


def _check_mounts(old: Spec, new: Spec) -> None:
    missing = sorted((_destinations(old) - _destinations(new)) | (set(binds(old)) - set(binds(new))))
    if missing:
        raise RestoreError(
            f"the checkpoint's processes have mounts that the container does not get: {', '.join(missing)}",
            hint="create it with the same kind of mount at each of these places, by the same engine",
        )
    added = sorted(_destinations(new) - _destinations(old) - ENGINES_OWN)
    if added:
        raise RestoreError(
            f"the container gets mounts that its restored processes cannot see: {', '.join(added)}",
            hint="create it with the mounts of the checkpoint's container only",
        )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
