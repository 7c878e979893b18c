# SPDX-License-Identifier: Apache-2.0
"""Another node's render node numbers: this node's /dev/dri/renderDN into the /dev that CRIU is about to restore.

CRIU's amdgpu plugin finds by itself which GPU of this node stands in for which, and opens its /dev/dri/renderDN from
within the container, whose /dev is the old node's: the content of a tmpfs, which CRIU keeps as tmpfs-dev-N.tar.gz.img
and unpacks before it restores files (criu/filesystems.c). So the missing nodes are put in front of that archive: gzip
members and tar entries may simply be joined, and the original bytes stay as they are. After the restore the image
is as it was.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import stat
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from cryoci.errors import UnsupportedError
from cryoci.files import write_atomic

ORIGINAL = ".cryoci-orig"  # what a restore that was killed has left
_IMAGE = re.compile(r"tmpfs-(dev-)?\d+\.tar\.gz\.img")
_RENDER = re.compile(r"/dev/dri/renderD(\d+)")
_MAJOR = 226  # DRM
_LIMIT = 64 << 20  # bytes of an archive, unpacked, in which a /dev is looked for: one holds next to none
_LARGEST = 256 << 20  # bytes of an image that is rewritten


@contextlib.contextmanager
def provided(images: str, spec: Mapping[str, Any], moved: Mapping[str, str]) -> Iterator[list[str]]:
    """For a with block, have the /dev in `images` hold what `moved` leads to: {old node's path: this node's}.

    Yields the paths that were put in. Nothing is done where the container has no /dev/dri of its own but this node's,
    bound into it. Raises UnsupportedError when its `spec` gives it others, or when the image cannot be changed.
    """
    check(spec, moved)
    wanted = {new: old for old, new in moved.items()}
    place = _find(images, wanted) if wanted else None
    if place is None:
        yield []
        return
    path, missing = place
    if not missing:
        yield []
        return
    original = path + ORIGINAL
    try:
        with open(path, "rb") as f:
            raw = f.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise UnsupportedError(
                f"{os.path.basename(path)} of the checkpoint is too large for a /dev: {len(raw) >> 20} MiB"
            )
        mode = stat.S_IMODE(os.stat(path).st_mode)
        os.link(path, original)
        write_atomic(path, _archive(missing) + raw, mode=mode)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.unlink(original)
        raise UnsupportedError(
            f"this node's AMD render nodes have other numbers, and {path} cannot be changed for them: {e.strerror}",
            hint="copy the checkpoint to where it can be written",
        ) from e
    try:
        yield sorted(missing)
    finally:
        os.replace(original, path)


def _find(images: str, wanted: Mapping[str, str]) -> tuple[str, dict[str, tarfile.TarInfo]] | None:
    """The image with the container's /dev/dri, and what it lacks of `wanted` ({new: old}): new path -> old's entry."""
    for name in sorted(os.listdir(images)):
        path = f"{images}/{name}"
        if name.endswith(ORIGINAL) and _IMAGE.fullmatch(name.removesuffix(ORIGINAL)):
            os.replace(path, path.removesuffix(ORIGINAL))
    for name in sorted(os.listdir(images)):
        path = f"{images}/{name}"
        if _IMAGE.fullmatch(name) and stat.S_ISREG(os.lstat(path).st_mode):
            there = _nodes(path)
            if any(old in there for old in wanted.values()):
                first = next(there[old] for old in wanted.values() if old in there)
                missing = {
                    new: there.get(old, first) for new, old in wanted.items() if not _is(there.get(new), new)
                }
                return path, missing
    return None


def _nodes(path: str) -> dict[str, tarfile.TarInfo]:
    """What is in dri/ of a tmpfs, as /dev/dri/NAME; what cannot be read has nothing."""
    found: dict[str, tarfile.TarInfo] = {}
    try:
        with gzip.open(path) as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
            for member in tar:
                if tar.offset > _LIMIT:
                    break
                name = os.path.normpath(member.name)
                if name.startswith("dri/"):
                    found[f"/dev/{name}"] = member
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error):
        return {}
    return found


def _is(member: tarfile.TarInfo | None, path: str) -> bool:
    """Whether an entry is the device that `path` should be."""
    return (
        member is not None
        and member.ischr()
        and (member.devmajor, member.devminor) == (_MAJOR, _minor(path))
    )


def _archive(missing: Mapping[str, tarfile.TarInfo]) -> bytes:
    """A gzip member with entries for the devices, and without the end of an archive: the original goes on there."""
    directory = tarfile.TarInfo("./dri")
    directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, int(time.time())
    entries = [directory]
    for path, like in sorted(missing.items()):
        node = tarfile.TarInfo(f".{path.removeprefix('/dev')}")
        node.type, node.mtime = tarfile.CHRTYPE, directory.mtime
        node.mode, node.uid, node.gid = like.mode & 0o7777, like.uid, like.gid
        node.devmajor, node.devminor = _MAJOR, _minor(path)
        entries.append(node)
    return gzip.compress(b"".join(e.tobuf(tarfile.GNU_FORMAT) for e in entries))


def _minor(path: str) -> int:
    found = _RENDER.fullmatch(path)
    assert found is not None  # kfd.Gpu.render made it
    return int(found[1])


def check(spec: Mapping[str, Any], moved: Mapping[str, str]) -> None:
    """See that the container is given the render nodes that the plugin will open. Raises UnsupportedError.

    A container whose specification names none has them otherwise: all of /dev/dri bound into it, or privileged.
    """
    devices = (spec.get("linux") or {}).get("devices") or []
    given = {
        str(d.get("path")) for d in devices if isinstance(d, dict) and _RENDER.fullmatch(str(d.get("path")))
    }
    lacking = sorted(set(moved.values()) - given)
    if given and lacking:
        raise UnsupportedError(
            f"the checkpoint's AMD GPUs go to {', '.join(sorted(moved.values()))} here, and the container is given "
            f"{', '.join(sorted(given))}",
            hint="ask for those GPUs: annotation io.cryoci.gpus with their CDI names (`cryoci cdi list`)",
        )
