# SPDX-License-Identifier: Apache-2.0
"""From one engine's checkpoint to another's: names, descriptions and file system in the other's words.

What the other engine has no place for is not dropped in silence: `convert` returns the list of it. The
CRIU images themselves are never touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cryoci.errors import ConflictError, UnsupportedError, UsageError
from cryoci.ociimage import archive, dialects, rootfsdiff
from cryoci.ociimage.criu import processes
from cryoci.ociimage.criu.image import DirectoryImages
from cryoci.ociimage.dialects import CONTAINERD, CRIO, PODMAN, Dialect, Model

_ZERO_TIME = "0001-01-01T00:00:00Z"  # Go's
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
# Files that every engine binds into a container itself; they are no bind mounts of its own.
_ENGINES_OWN = frozenset(
    "/dev/shm /etc/hostname /etc/hosts /etc/resolv.conf /run/.containerenv /run/secrets /dev/termination-log".split()
)
# cri-o internal/lib/checkpoint.go, containerMounts
_CRIO_MOUNTS = _ENGINES_OWN | frozenset("/proc /dev /dev/pts /dev/mqueue /sys /sys/fs/cgroup".split())
_CRI = "io.kubernetes.cri."
_ROOT_MODES = {
    "crio": 0o555,
    "podman": 0o555,
    "containerd": 0o755,
}  # containers/storage, overlayfs snapshotter


@dataclass(frozen=True)
class Base:
    """A base image for an engine that will have one: its name there and, for podman and CRI-O, its id."""

    name: str
    id: str = ""
    digest: str = ""


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


def convert(
    model: Model, dialect: Dialect, directory: Path, *, base: Base | None = None, bundled: bool = False
) -> Converted:
    """Make `directory`, the checkpoint of `model` in the words of `dialect`; files are linked, not copied,
    where both lie in one file system.

    `base` is the image to restore onto, for checkpoints that name none (runc, crun) or another engine's.
    `bundled`: whoever restores takes spec.dump as his bundle's config.json (ctr), and makes no new one.
    Raises ConflictError, UnsupportedError when the CRIU images cannot be carried, UsageError without a base.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise ConflictError(f"{directory} exists", hint="name another directory") from None
    done = Converted(directory, dialect.name)
    _check_dump(model, dialect)
    base = _base(model, dialect, base)
    _files(model, dialect, done)
    _rootfs(model, dialect, done)
    _log(model, dialect, done)
    spec = _spec(model, dialect, done, bundled=bundled)
    _root_mode(model, dialect, done)
    _write(directory / archive.SPEC, spec)
    _write(directory / archive.CONFIG, _CONFIGS[dialect.name](model, base, spec, done))
    if dialect is CONTAINERD:
        _status(model, base, done)
    if dialect is CRIO:
        _bind_mounts(model, done)
    _options(model, done)
    return done


def _check_dump(model: Model, dialect: Dialect) -> None:
    if model.checkpoint.has_parent and "pre-checkpoint" not in dialect.folders:
        raise UnsupportedError(
            f"this checkpoint is incremental (podman --with-previous), and {dialect.name} has no such archives",
            hint="make a full one: leave --with-previous out",
        )


def own_base(model: Model) -> Base:
    """The base image that the checkpoint names; its fields may be empty."""
    facts = model.facts
    name, _, _ = facts.get("image.name", "").partition("@")
    return Base(name, facts.get("image.id", "").removeprefix("sha256:"), facts.get("image.digest", ""))


def _base(model: Model, dialect: Dialect, given: Base | None) -> Base:
    """The base image in the words of the target. Raises UsageError when nobody knows one."""
    found = given or own_base(model)
    needs_id = dialect in (CRIO, PODMAN)
    if not found.name or (needs_id and not _HEX64.match(found.id)):
        what = (
            "names no base image"
            if not found.name
            else f"does not say the id of its base image {found.name}"
        )
        raise UsageError(
            f"the checkpoint {what}, and {dialect.name} restores only onto one",
            hint="name it: --base-image NAME"
            + (" --base-id ID (podman image inspect --format {{.Id}} NAME)" if needs_id else ""),
        )
    return found


def _files(model: Model, dialect: Dialect, done: Converted) -> None:
    """Take over what both know by the same name."""
    rewritten = {archive.CONFIG, archive.SPEC, "rootfs-diff.tar", "deleted.files", "rootfs.tar", archive.OWN}
    for folder in model.checkpoint.folders:
        if folder in dialect.folders:
            (done.directory / folder).mkdir(mode=0o700)
    if model.checkpoint.has_parent:
        os.symlink(archive.PARENT_TARGET, done.directory / archive.PARENT)
    for file in model.checkpoint.files:
        folder, slash, _ = file.name.partition("/")
        if file.name in rewritten or file.name in dialects.LOGS:
            continue
        if (folder if slash else file.name) in (dialect.folders if slash else dialect.files):
            _link(model.directory / file.name, done.directory / file.name)
        elif why := _why_lost(model, file.name):
            done.lost.append(Lost(file.name, why))


def _why_lost(model: Model, name: str) -> str:
    """What it means that a file stays behind; empty when it means nothing to a restore."""
    if name.startswith("volumes/"):
        return "the content of a named volume: put it where the new container's volume is"
    if name == "devshm-checkpoint.tar":
        if rootfsdiff.is_empty(model.directory / name):
            return ""
        return "the content of /dev/shm: files there will be missing, and a process that has one open fails"
    reasons = {
        "network.status": "addresses and MACs: the new engine gives others",
        "bind.mounts": "which bind sources are files and which directories: make them before a restore",
        archive.STATUS: "labels and annotations as containerd's CRI knew them",
    }
    if name.startswith("artifacts/"):
        return "a file that the first engine kept beside the container"
    return reasons.get(name, "")


def _rootfs(model: Model, dialect: Dialect, done: Converted) -> None:
    names, source, target = model.names, model.directory, done.directory / "rootfs-diff.tar"
    # all files of a bare container are a change to any base: what the base has besides them stays visible
    diff = next((source / n for n in ("rootfs-diff.tar", "rootfs.tar") if n in names), None)
    if diff is not None and diff.name == "rootfs.tar":
        done.assumed.append("the whole root file system lies over the base image, whose other files stay")
    zipped = diff is not None and _gzipped(diff)
    deleted: list[str] = []
    if "deleted.files" in names:
        deleted = rootfsdiff.read_deleted(source / "deleted.files")
    if zipped == dialect.whiteouts and not (dialect.whiteouts and deleted):
        if diff is not None:
            _link(diff, target)
    elif dialect.whiteouts:
        if diff is not None or deleted:
            rootfsdiff.to_layer(diff, deleted, target)
    elif diff is not None:
        gone, opaque = rootfsdiff.from_layer(diff, target)
        deleted = [*deleted, *gone]
        for name in opaque:
            why = "it was emptied and filled anew: what the base image has in it will be visible again"
            done.lost.append(Lost(f"/{name}", why))
    if deleted and not dialect.whiteouts:
        rootfsdiff.write_deleted(done.directory / "deleted.files", deleted)


def _root_mode(model: Model, dialect: Dialect, done: Converted) -> None:
    """CRIU wants the root directory with the mode that it had, and engines make their own."""
    files = model.checkpoint
    mode = next(
        (p.root_mode & 0o7777 for p in processes.read(DirectoryImages(files.path)) if p.root_mode), None
    )
    made = _ROOT_MODES[dialect.name]
    if mode is not None and mode != made:
        done.assumed.append(
            f"CRIU runs with skip-file-rwx-check (/etc/criu/runc.conf): the root directory had mode {mode:o}, and "
            f"{dialect.name} makes it {made:o}"
        )


def _log(model: Model, dialect: Dialect, done: Converted) -> None:
    """All three write the kubelet's log format, each under a name of its own."""
    for name in dialects.LOGS:
        if name in model.names:
            _link(model.directory / name, done.directory / dialect.log)
            return


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
        "rootfsImageName": _pinned(base),
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
    own_network = isinstance(namespaces, list) and any(
        isinstance(n, dict) and n.get("type") == "network" for n in namespaces
    )
    if own_network:
        done.assumed.append("the container joins podman's default network")
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
        "createNetNS": own_network,
        "networkMode": "bridge" if own_network else "host",
        **({"newNetworks": {"podman": {"interface_name": "eth0"}}} if own_network else {}),
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
        "rootfsImageRef": _pinned(base),
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
        "image_ref": _pinned(base),
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


def _options(model: Model, done: Converted) -> None:
    """The options of the dump, which only cryoci.json keeps."""
    criu = model.own.get("criu")
    for name in ("tcp-established", "file-locks", "ext-unix-sk", "shell-job"):
        if isinstance(criu, dict) and criu.get(name) is True:
            done.lost.append(
                Lost(f"--{name}", "CRIU's option of the dump, which the restore must be given again")
            )


def _name(model: Model) -> str:
    return model.facts.get("container.name") or _id(model)[:12]


def _id(model: Model) -> str:
    found = model.facts.get("container.id", "")
    return found if _HEX64.match(found) else hashlib.sha256(found.encode()).hexdigest()


def _pinned(base: Base) -> str:
    """NAME@DIGEST without a tag, as the engines write it; NAME when the digest is not known."""
    if not base.digest:
        return base.name
    head, slash, last = base.name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}@{base.digest}"


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


def _gzipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))


def _link(source: Path, target: Path) -> None:
    """A hard link, which costs nothing; across file systems a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target, follow_symlinks=False)
