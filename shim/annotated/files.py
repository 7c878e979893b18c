# SPDX-License-Identifier: Apache-2.0
"""The checkpoint's files, written into what the engine has mounted for the new container."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cryoci.errors import UnsupportedError
from cryoci.files import read_json
from cryoci.shim import rootfs
from cryoci.shim.annotated import fit
from cryoci.shim.annotated.fetch import Checkpoint

_ZSTD = b"\x28\xb5\x2f\xfd"


def apply(checkpoint: Checkpoint, root: Path, spec: fit.Spec) -> None:
    """Write root file system, /dev/shm and volumes; the archives are untrusted (`rootfs.apply`).

    A volume gets the checkpoint's content only where it is empty and not read-only: else it is this node's
    own. Raises RestoreError, ImageError, UnsupportedError.
    """
    whole, diff, deleted = (
        _if_there(checkpoint.directory / name) for name in ("rootfs.tar", "rootfs-diff.tar", "deleted.files")
    )
    if diff is not None:
        _check_plain(diff)
    if whole is not None:
        rootfs.apply(root, whole)
    if diff is not None or deleted is not None:
        rootfs.apply(root, diff, deleted)
    mounts = fit.binds(spec)
    shm = _if_there(checkpoint.directory / "devshm-checkpoint.tar")
    if shm is not None and (where := _directory(mounts.get("/dev/shm"))):
        rootfs.apply(where, shm)
    for destination, archive in _volumes(checkpoint.directory).items():
        where = _directory(mounts.get(destination))
        if where is not None and not any(where.iterdir()):
            rootfs.apply(where, archive)


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _check_plain(diff: Path) -> None:
    with open(diff, "rb") as f:
        head = f.read(4)
    if head == _ZSTD:
        raise UnsupportedError(
            "the checkpoint's rootfs-diff.tar is compressed with zstd, which no engine writes",
            hint="unpack it; or checkpoint with cryoci, podman, CRI-O or containerd",
        )


def _directory(mount: dict[str, Any] | None) -> Path | None:
    """The directory behind a bind mount that the container may write to."""
    if mount is None or "ro" in (mount.get("options") or []):
        return None
    source = Path(str(mount.get("source")))
    return source if source.is_dir() else None


def _volumes(directory: Path) -> dict[str, Path]:
    """Destination -> archive of each named volume that the checkpoint brings (podman's config.dump)."""
    try:
        config = read_json(directory / "config.dump")
        named = config.get("namedVolumes") or []
        found = {
            os.path.normpath(str(one["dest"])): directory / "volumes" / f"{one['volumeName']}.tar"
            for one in named
            if "/" not in str(one["volumeName"])
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {destination: archive for destination, archive in found.items() if archive.is_file()}
