# SPDX-License-Identifier: Apache-2.0
"""The dialects of checkpoint archives: what CRI-O, podman and containerd each write, and need to restore.

Sources: cri-o internal/lib/checkpoint.go and server/container_restore.go, podman
libpod/container_internal_common.go, containerd 2.3 internal/cri/server/container_checkpoint_linux.go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoci.errors import UsageError
from cryoci.ociimage import archive, strictjson

MANAGER = "io.container.manager"  # annotation of spec.dump by which checkpointctl tells engines apart
CRIO_ANNOTATIONS = "io.kubernetes.cri-o.Annotations"  # a JSON object; CRI-O restores nothing without it
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,511}\Z")


@dataclass(frozen=True)
class Dialect:
    """One engine's archive: the names that it may hold, those that its restore needs, and its log's name.

    `manager` is the marker in spec.dump's annotations; containerd has none. `whiteouts`: deletions are
    `.wh.` entries of a gzipped rootfs-diff.tar, not names in deleted.files.
    """

    name: str
    files: frozenset[str]
    folders: frozenset[str]
    required: tuple[str, ...]
    log: str
    manager: str | None
    whiteouts: bool = False


_COMMON = frozenset({archive.CONFIG, archive.SPEC, "stats-dump", "rootfs-diff.tar"})
CRIO = Dialect(
    "crio",
    _COMMON | {"dump.log", "bind.mounts", "deleted.files", "io.kubernetes.cri-o.LogPath"},
    frozenset({"checkpoint"}),
    (archive.CONFIG, archive.SPEC),
    "io.kubernetes.cri-o.LogPath",
    "cri-o",
)
PODMAN = Dialect(
    "podman",
    _COMMON | {"network.status", "devshm-checkpoint.tar", "deleted.files", "ctr.log"},
    frozenset({"artifacts", "checkpoint", "pre-checkpoint", "volumes"}),
    (archive.CONFIG, archive.SPEC),
    "ctr.log",
    "libpod",
)
CONTAINERD = Dialect(
    "containerd",
    _COMMON | {"dump.log", archive.STATUS, "status", "container.log"},
    frozenset({"checkpoint"}),
    (archive.CONFIG, archive.SPEC, archive.STATUS),
    "container.log",
    None,
    whiteouts=True,
)
DIALECTS = {dialect.name: dialect for dialect in (CRIO, PODMAN, CONTAINERD)}
# What a restore under bare runc or crun reads: no engine's archive, so no target of `cryoci convert`.
BARE = Dialect(
    "bare",
    frozenset({archive.SPEC, "stats-dump", "rootfs-diff.tar", "deleted.files", "dump.log", "container.log"}),
    frozenset({"checkpoint"}),
    (archive.SPEC,),
    "container.log",
    None,
)
LOGS = tuple(dialect.log for dialect in DIALECTS.values())


@dataclass(frozen=True)
class Model:
    """A checked checkpoint directory with its descriptions; documents that are not there are empty."""

    checkpoint: archive.Checkpoint
    config: Mapping[str, Any]
    spec: Mapping[str, Any]
    own: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        return self.checkpoint.path

    @property
    def names(self) -> frozenset[str]:
        """Of all files."""
        return frozenset(file.name for file in self.checkpoint.files)

    @property
    def facts(self) -> Mapping[str, str]:
        return self.checkpoint.facts

    @property
    def dialect(self) -> Dialect | None:
        """Whose archive it is; None for bare runc and crun, and for what nobody claims."""
        noted = self.spec.get("annotations")
        manager = noted.get(MANAGER) if isinstance(noted, dict) else None
        for dialect in DIALECTS.values():
            if manager is not None and dialect.manager == manager:
                return dialect
        found = archive.STATUS in self.names or self.own.get("engine") == "containerd"
        return CONTAINERD if found else None

    @property
    def mounts(self) -> list[Mapping[str, Any]]:
        """spec.dump's mounts, as far as they are objects."""
        mounts = self.spec.get("mounts")
        return [m for m in mounts if isinstance(m, dict)] if isinstance(mounts, list) else []

    def text(self, key: str) -> str:
        """A string of config.dump, or empty."""
        value = self.config.get(key)
        return value if isinstance(value, str) else ""


def read(directory: Path) -> Model:
    """Check and read a checkpoint directory of any dialect. Raises NotFoundError, ImageError."""
    checkpoint = archive.validate(directory)
    names = {file.name for file in checkpoint.files}

    def document(name: str) -> dict[str, Any]:
        if name not in names:
            return {}
        return strictjson.load_object(archive.read(directory / name), name, limit=archive.MAX_JSON)

    return Model(checkpoint, document(archive.CONFIG), document(archive.SPEC), document(archive.OWN))


def of(name: str) -> Dialect:
    """The dialect of that name. Raises UsageError."""
    if name not in DIALECTS:
        raise UsageError(f"no engine {name!r} is known", hint=f"use one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def problems(model: Model, dialect: Dialect) -> list[str]:
    """Why the engine of `dialect` would not take this archive, or not all of it; empty when it would."""
    names, found = model.names, []
    found += [f"{name} is missing" for name in dialect.required if name not in names]
    for name in sorted(names):
        folder, slash, _ = name.partition("/")
        if (folder if slash else name) not in (dialect.folders if slash else dialect.files):
            found.append(f"{name} is nothing that {dialect.name} knows")
    if model.checkpoint.has_parent and "pre-checkpoint" not in dialect.folders:
        found.append("checkpoint/parent: incremental dumps are podman's alone")
    noted = model.spec.get("annotations")
    manager = noted.get(MANAGER) if isinstance(noted, dict) else None
    if dialect.manager is not None and manager != dialect.manager:
        found.append(f"spec.dump is marked as {manager or 'nobody'}'s, not {dialect.manager}'s")
    if "rootfs-diff.tar" in names:
        with open(model.directory / "rootfs-diff.tar", "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        if zipped != dialect.whiteouts:
            found.append(f"rootfs-diff.tar is {'' if zipped else 'not '}gzipped")
    found += _OWN_PROBLEMS[dialect.name](model)
    return found


def _crio_problems(model: Model) -> list[str]:
    found = []
    noted = model.spec.get("annotations")
    if not isinstance(noted, dict) or not _is_object(noted.get(CRIO_ANNOTATIONS)):
        found.append(f"spec.dump has no annotation {CRIO_ANNOTATIONS}")
    if not _HEX64.match(model.text("rootfsImageRef")):
        found.append("config.dump: rootfsImageRef is not an image id")
    return found


def _podman_problems(model: Model) -> list[str]:
    found = []
    if not _HEX64.match(model.text("id")):
        found.append("config.dump: id is not 64 hex digits")
    if not _HEX64.match(model.text("rootfsImageID")) or not model.text("rootfsImageName"):
        found.append("config.dump names no base image (rootfsImageID, rootfsImageName)")
    if not model.text("runtime"):
        found.append("config.dump names no runtime")
    return found


def _containerd_problems(model: Model) -> list[str]:
    return [
        f"config.dump: {key} is not an image reference"
        for key in ("rootfsImageRef", "rootfsImageName")
        if not _REFERENCE.match(model.text(key))
    ]


_OWN_PROBLEMS = {"crio": _crio_problems, "podman": _podman_problems, "containerd": _containerd_problems}


def _is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
