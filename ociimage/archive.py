# SPDX-License-Identifier: Apache-2.0
"""The checkpoint directory: which files a checkpoint may hold, and what they say about it.

The layout is that of podman's, CRI-O's and containerd's archives (their union, unpacked), plus cryoci.json
and rootfs.tar. It is flat: nothing lies deeper than one folder, everything is a regular file, and the one
symbolic link is podman's checkpoint/parent. Names: checkpointctl lib/metadata.go.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryoci.errors import ImageError, NotFoundError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import strictjson

CONFIG, SPEC, STATUS, OWN = "config.dump", "spec.dump", "status.dump", "cryoci.json"
TOP_FILES = frozenset(
    {
        CONFIG,
        SPEC,
        STATUS,
        OWN,
        "status",
        "network.status",
        "bind.mounts",
        "stats-dump",
        "dump.log",
        "restore.log",
    }
    | {"descriptors.json", "ctr.log", "container.log", "io.kubernetes.cri-o.LogPath", "deleted.files"}
    | {"rootfs-diff.tar", "rootfs.tar", "devshm-checkpoint.tar", "pod.options", "pod.dump"}
)
FOLDERS = ("artifacts", "checkpoint", "pre-checkpoint", "volumes")
BULK = ("rootfs-diff.tar", "rootfs.tar", "devshm-checkpoint.tar")  # and volumes/*: layers of their own
PARENT, PARENT_TARGET = "checkpoint/parent", "../pre-checkpoint"  # podman --with-previous
MAX_JSON = 16 << 20  # bytes of any one description file
MAX_FILES = 100_000
_FLAT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:+=,-]{0,254}\Z")
_MANAGERS = {"libpod": "podman", "cri-o": "cri-o"}
_VERSION = re.compile(rb"Version: (\d+\.\d+(?:\.\d+)?)")
DESCRIPTIONS = (CONFIG, SPEC, OWN)  # what `facts` reads


@dataclass(frozen=True)
class File:
    """A file of a checkpoint: its name relative to the directory, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked directory: files in name order, the folders that exist, its facts (annotations.FACTS)."""

    path: Path
    files: tuple[File, ...]
    folders: tuple[str, ...]
    has_parent: bool
    facts: Mapping[str, str]
    created: datetime

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def allowed(name: str) -> bool:
    """Whether a checkpoint may hold a regular file of this name."""
    folder, slash, base = name.partition("/")
    if not slash:
        return name in TOP_FILES
    if folder not in FOLDERS or not _FLAT.match(base) or name == PARENT:
        return False
    return folder != "volumes" or base.endswith(".tar")


def validate(directory: Path) -> Checkpoint:
    """Check the names and kinds of all files and read what they say.

    Raises NotFoundError when there is no such directory, ImageError when something in it has no place in a
    checkpoint, or when no CRIU image is there.
    """
    if not directory.is_dir():
        raise NotFoundError(f"no checkpoint directory at {directory}")
    files: list[File] = []
    folders: list[str] = []
    has_parent = False
    for name, info in _walk(directory):
        if stat.S_ISDIR(info.st_mode) and name in FOLDERS:
            folders.append(name)
        elif name == PARENT and stat.S_ISLNK(info.st_mode):
            if os.readlink(directory / name).rstrip("/") != PARENT_TARGET:
                raise ImageError(f"{name} does not lead to {PARENT_TARGET}")
            has_parent = True
        elif not stat.S_ISREG(info.st_mode) or not allowed(name):
            raise ImageError(
                f"{directory} holds {name!r}, which has no place in a checkpoint",
                hint="a checkpoint holds regular files: config.dump, spec.dump, ..., checkpoint/*",
            )
        else:
            files.append(File(name, info.st_size))
        if len(files) > MAX_FILES:
            raise ImageError(f"{directory} holds over {MAX_FILES} files")
    names = {file.name for file in files}
    if not names & {"checkpoint/inventory.img", "pre-checkpoint/inventory.img"}:
        raise ImageError(
            f"{directory} is not a checkpoint: it has no checkpoint/inventory.img",
            hint="give the directory that `cryoci checkpoint -o DIR` made, or an unpacked engine archive",
        )
    texts = {name: read(directory / name, MAX_JSON) for name in DESCRIPTIONS if name in names}
    found = facts(texts)
    for log in ("dump.log", "checkpoint/dump.log"):
        if log in names and (match := _VERSION.search(read(directory / log, None))):
            found.setdefault("criu.version", match[1].decode())
    return Checkpoint(
        directory,
        tuple(sorted(files, key=lambda file: file.name)),
        tuple(sorted(folders)),
        has_parent,
        found,
        _created(directory, found, names),
    )


def facts(texts: Mapping[str, bytes]) -> dict[str, str]:
    """What config.dump, spec.dump and cryoci.json say, as far as they are there, by annotations.FACTS."""
    documents = {name: strictjson.load_object(data, name, limit=MAX_JSON) for name, data in texts.items()}
    config, own = documents.get(CONFIG, {}), documents.get(OWN, {})
    noted = _dict(documents.get(SPEC, {}).get("annotations"))
    container = _dict(own.get("container"))
    reference = _text(config, "rootfsImageRef")
    name = _text(config, "rootfsImageName") or _text(config, "rootfsImage")
    _, _, digest = (reference if "@" in reference else name).partition("@")
    runtime = _text(config, "runtime") or _text(config, "ociRuntime")
    found = {
        "engine.name": _text(own, "engine") or _engine(noted, documents),
        "container.name": _text(container, "name") or _text(config, "name"),
        "container.id": _text(container, "id") or _text(config, "id"),
        "pod.name": _text(noted, "io.kubernetes.pod.name") or _text(noted, "io.kubernetes.cri.sandbox-name"),
        "pod.namespace": _text(noted, "io.kubernetes.pod.namespace")
        or _text(noted, "io.kubernetes.cri.sandbox-namespace"),
        "image.name": name,
        "image.requested": _text(config, "rootfsImage"),
        "image.id": _text(config, "rootfsImageID") or ("" if "@" in reference else reference),
        "image.digest": digest,
        "image.raw": _text(config, "RawImageName") or _text(config, "rawImageName"),
        "runtime.name": os.path.basename(runtime),
        "checkpointed": _text(config, "checkpointedTime"),
    }
    if _text(noted, "io.kubernetes.cri-o.ContainerName"):
        found["container.name"] = _text(noted, "io.kubernetes.container.name") or found["container.name"]
    for key, value in _dict(own.get("annotations")).items():
        if not isinstance(value, str):
            raise ImageError(f"{OWN}: annotation {key[:100]!r} is not a string")
        found[key] = value
    return {key: value for key, value in found.items() if value}


def unknown(name: str) -> ImageError:
    """The error for an archive member that has no place in a checkpoint."""
    return ImageError(
        f"the image holds {name[:200]!r}, which has no place in a checkpoint",
        hint="only the files that podman, CRI-O, containerd and cryoci write are accepted",
    )


def parse_time(text: str) -> datetime | None:
    """An RFC 3339 time as Go writes it (nanoseconds), or None; Go's zero time counts as none."""
    match = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)\Z", text)
    if not match or text.startswith("0001-"):
        return None
    try:
        return datetime.fromisoformat(match[1] + match[2].replace("Z", "+00:00")).astimezone(UTC)
    except ValueError:
        return None


def _walk(directory: Path) -> list[tuple[str, os.stat_result]]:
    found = []
    for entry in os.scandir(directory):
        found.append((entry.name, entry.stat(follow_symlinks=False)))
        if entry.name in FOLDERS and entry.is_dir(follow_symlinks=False):
            found += [
                (f"{entry.name}/{e.name}", e.stat(follow_symlinks=False)) for e in os.scandir(entry.path)
            ]
    return found


def _created(directory: Path, found: Mapping[str, str], names: set[str]) -> datetime:
    """When the dump was made: config.dump's word, else the time of CRIU's inventory."""
    if when := parse_time(found.get(families.CREATED) or found.get("checkpointed", "")):
        return when
    folder = "checkpoint" if "checkpoint/inventory.img" in names else "pre-checkpoint"
    return datetime.fromtimestamp(int((directory / folder / "inventory.img").stat().st_mtime), UTC)


def _engine(noted: Mapping[str, Any], documents: Mapping[str, Any]) -> str:
    manager = _text(noted, "io.container.manager")
    if manager:
        return _MANAGERS.get(manager, manager)
    # containerd leaves no marker; checkpointctl takes it as the default branch too
    return "containerd" if any(key.startswith("io.kubernetes.cri.") for key in noted) else ""


def read(path: Path, limit: int | None = MAX_JSON) -> bytes:
    """A description file of at most `limit` bytes; the first 8 KiB with None. Raises ImageError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        data = file.read(8192 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise ImageError(f"{path.name} is over {limit} bytes")
    return data


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    return text if isinstance(text, str) else ""
