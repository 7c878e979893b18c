# SPDX-License-Identifier: Apache-2.0
"""The descriptions of a checkpoint in another engine's words: spec.dump, config.dump, status.dump, bind.mounts.

What `convert` puts together is a `Converted`; here each of its JSON documents is made.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cryoci.ociimage import archive, dialects
from cryoci.ociimage.dialects import BARE, CONTAINERD, CRIO, PODMAN, Dialect, Model

_ZERO_TIME = "0001-01-01T00:00:00Z"  # Go's
HEX64 = re.compile(r"[0-9a-f]{64}\Z")
# Files that every engine binds into a container itself; they are no bind mounts of its own.
_ENGINES_OWN = frozenset(
    "/dev/shm /etc/hostname /etc/hosts /etc/resolv.conf /run/.containerenv /run/secrets /dev/termination-log".split()
)
# cri-o internal/lib/checkpoint.go, containerMounts
_CRIO_MOUNTS = _ENGINES_OWN | frozenset("/proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup".split())
_CRI = "io.kubernetes.cri."


@dataclass(frozen=True)
class Base:
    """A base image for an engine that will have one: its name there and, for podman and CRI-O, its id."""

    name: str
    id: str = ""
    digest: str = ""

    @property
    def pinned(self) -> str:
        """NAME@DIGEST without a tag, as the engines write it; NAME when the digest is not known."""
        if not self.digest:
            return self.name
        head, slash, last = self.name.rpartition("/")
        return f"{head}{slash}{last.partition(':')[0]}@{self.digest}"


@dataclass(frozen=True)
class Lost:
    """Something of the checkpoint that its new form does not hold, and what that means."""

    what: str
    why: str


@dataclass
class Converted:
    """A directory in the words of `dialect`. `lost` was left out; `assumed` had to be guessed."""

    directory: Path
    dialect: str
    lost: list[Lost] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def describe(model: Model, dialect: Dialect, base: Base, done: Converted, *, bundled: bool) -> None:
    """Write the documents of `dialect` into `done.directory`, and note there what was lost or assumed.

    `bundled`: spec.dump will be the config.json of a bundle as it is.
    """
    spec = _spec(model, dialect, done, bundled=bundled)
    _write(done.directory / archive.SPEC, spec)
    if dialect is not BARE:
        _write(done.directory / archive.CONFIG, _CONFIGS[dialect.name](model, base, spec, done))
    if dialect is CONTAINERD:
        _status(model, base, done)
    if dialect is CRIO:
        _bind_mounts(model, done)


def _spec(model: Model, dialect: Dialect, done: Converted, *, bundled: bool) -> dict[str, Any]:
    spec = dict(model.spec)
    if spec.pop("hooks", None):
        done.lost.append(
            Lost("hooks of spec.dump", "programs of the first node, which an archive must not run")
        )
    noted = spec.get("annotations")
    notes = {k: v for k, v in noted.items() if isinstance(v, str)} if isinstance(noted, dict) else {}
    notes.pop(dialects.MANAGER, None)
    if dialect.manager is not None:
        notes[dialects.MANAGER] = dialect.manager
    facts = model.facts
    pod = {"name": facts.get("pod.name", ""), "namespace": facts.get("pod.namespace", "")}
    if dialect is CRIO and model.dialect is not CRIO:
        notes.setdefault(dialects.CRIO_ANNOTATIONS, "{}")
        notes.setdefault("io.kubernetes.cri-o.Labels", "{}")
        notes.setdefault("io.kubernetes.cri-o.Metadata", json.dumps({"name": _name(model)}))
        notes.setdefault("io.kubernetes.container.name", _name(model))
        for key, value in pod.items():
            notes.setdefault(f"io.kubernetes.pod.{key}", value)
        done.assumed.append(
            "the Kubernetes annotations of the container, which the first engine never had, are empty"
        )
    if dialect is CONTAINERD:
        notes.setdefault(f"{_CRI}container-type", "container")
        notes.setdefault(f"{_CRI}container-name", _name(model))
        for key, value in pod.items():
            notes.setdefault(f"{_CRI}sandbox-{key}", value)
    spec["annotations"] = notes
    if bundled:
        linux = spec.get("linux")
        spec["linux"] = {
            **(linux if isinstance(linux, dict) else {}),
            "cgroupsPath": f"/default/{_name(model)}",
        }
        spec["root"] = {"path": "rootfs"}
        for namespace in spec["linux"].get("namespaces") or ():
            if isinstance(namespace, dict) and namespace.get("path"):
                done.assumed.append(f"the node that restores has the namespace {namespace['path']}")
    own = frozenset[str]() if bundled else _ENGINES_OWN | _volumes(model, dialect)
    for mount in model.mounts:
        place, origin = str(mount.get("destination")), mount.get("source")
        if mount.get("type") == "bind" and place not in own and not place.startswith("/run/secrets"):
            done.assumed.append(f"the node that restores has {origin}, mounted at {place}")
    return spec


def _volumes(model: Model, dialect: Dialect) -> frozenset[str]:
    """Where named volumes are mounted that the target makes itself."""
    volumes = model.config.get("namedVolumes") if dialect is PODMAN else None
    found = volumes if isinstance(volumes, list) else []
    return frozenset(str(v.get("dest")) for v in found if isinstance(v, dict))


def _crio_config(model: Model, base: Base, spec: Mapping[str, Any], done: Converted) -> dict[str, Any]:
    name = _name(model)
    if model.dialect is CRIO:
        name = model.text("name")
    elif model.facts.get("pod.name"):
        pod = f"{model.facts['pod.name']}_{model.facts.get('pod.namespace', 'default')}"
        name = f"k8s_{name}_{pod}_{_id(model)[:36]}_0"
    return {
        "id": _id(model),
        "name": name,
        "rootfsImage": base.name,
        "rootfsImageRef": base.id,
        "rootfsImageName": base.pinned,
        "runtime": _runtime(model),
        **_times(model),
        "restoredTime": _ZERO_TIME,
        "restored": False,
    }


def _podman_config(model: Model, base: Base, spec: Mapping[str, Any], done: Converted) -> dict[str, Any]:
    if model.dialect is PODMAN:
        return {**model.config, "rootfsImageID": base.id, "rootfsImageName": base.name}
    if _id(model) != model.facts.get("container.id"):
        done.assumed.append(f"the container's id is {_id(model)[:12]}, as podman's must be 64 hex digits")
    process = spec.get("process")
    args = process.get("args") if isinstance(process, dict) else None
    linux = spec.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    namespaces = namespaces if isinstance(namespaces, list) else []
    network = next((n for n in namespaces if isinstance(n, dict) and n.get("type") == "network"), None)
    # CRIU makes a namespace anew that the runtime had made (EmptyNs), and puts nothing of an engine's in its place
    joined = network is not None and bool(network.get("path"))
    if joined:
        done.assumed.append("the container joins podman's default network")
    elif network is not None:
        done.assumed.append("the container has no network but its own loopback, as before")
    # the fields that podman's import reads or has no default for (libpod/container_config.go, pkg/checkpoint)
    return {
        "spec": dict(spec),
        "id": _id(model),
        "name": _name(model),
        "RawImageName": base.name,
        "idMappingsOptions": {"HostUIDMapping": True, "HostGIDMapping": True},
        "rootfsImageID": base.id,
        "rootfsImageName": base.name,
        "shmSize": 65536000,
        "createNetNS": joined,
        "networkMode": "bridge" if joined else "host" if network is None else "none",
        **({"newNetworks": {"podman": {"interface_name": "eth0"}}} if joined else {}),
        "command": args if isinstance(args, list) else [],
        "stopSignal": 15,
        "stopTimeout": 10,
        "createdTime": _times(model)["createdTime"],
        "cgroupsMode": "enabled",
        "logDriver": "k8s-file",
        "runtime": _runtime(model),
        "sdnotifyMode": "container",
        "umask": "0022",
    }


def _containerd_config(model: Model, base: Base, spec: Mapping[str, Any], done: Converted) -> dict[str, Any]:
    if not base.digest:
        done.assumed.append(
            f"{base.name} is the same image on the node that restores: its digest is not known"
        )
    return {
        "id": _id(model),
        "name": _name(model),
        "rootfsImage": base.name,
        "rootfsImageRef": base.pinned,
        "rootfsImageName": base.name,
        "runtime": "io.containerd.runc.v2",
        **_times(model),
        "restoredTime": _ZERO_TIME,
        "restored": False,
    }


_CONFIGS = {"crio": _crio_config, "podman": _podman_config, "containerd": _containerd_config}


def _status(model: Model, base: Base, done: Converted) -> None:
    """status.dump as the CRI's ContainerStatus, and `status`, when the checkpoint brings none."""
    if archive.STATUS in model.names:
        return
    created = _nanoseconds(_times(model)["createdTime"])
    labels = {"io.kubernetes.container.name": _name(model)}
    for key in ("name", "namespace"):
        if value := model.facts.get(f"pod.{key}"):
            labels[f"io.kubernetes.pod.{key}"] = value
    status: dict[str, Any] = {
        "id": _id(model),
        "metadata": {"name": _name(model)},
        "state": 1,
        "created_at": created,
        "started_at": created,
        "image": {"image": base.name, "user_specified_image": base.name},
        "image_ref": base.pinned,
        "labels": labels,
        "annotations": {},
    }
    _write(done.directory / archive.STATUS, status)
    if "status" not in model.names:
        inner = {"Version": "v1", "Pid": 0, "CreatedAt": created, "StartedAt": created, "FinishedAt": 0}
        _write(
            done.directory / "status",
            {**inner, "ExitCode": 0, "Reason": "", "Message": "", "Resources": None},
        )
    done.assumed.append("status.dump is made up from the other descriptions: no labels but the names")


def _bind_mounts(model: Model, done: Converted) -> None:
    if "bind.mounts" in model.names:
        return
    found = []
    for mount in model.mounts:
        if mount.get("type") == "bind" and mount.get("destination") not in _CRIO_MOUNTS:
            found.append(
                {
                    "source": mount.get("source"),
                    "destination": mount.get("destination"),
                    "file_type": "directory",
                    "permissions": 0o755,
                }
            )
            done.assumed.append(f"{mount.get('destination')} is a directory, if CRI-O has to make it")
    if found:
        (done.directory / "bind.mounts").write_text(json.dumps(found, indent=2))


def _name(model: Model) -> str:
    return model.facts.get("container.name") or _id(model)[:12]


def _id(model: Model) -> str:
    found = model.facts.get("container.id", "")
    return found if HEX64.match(found) else hashlib.sha256(found.encode()).hexdigest()


def _runtime(model: Model) -> str:
    found = model.facts.get("runtime.name", "")
    return "runc" if found in ("", "io.containerd.runc.v2") else found


def _times(model: Model) -> dict[str, str]:
    dumped = model.checkpoint.created.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "createdTime": model.text("createdTime") or dumped,
        "checkpointedTime": model.text("checkpointedTime") or dumped,
    }


def _nanoseconds(text: str) -> int:
    when = archive.parse_time(text)
    return int(when.timestamp()) * 10**9 if isinstance(when, datetime) else 0


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))
