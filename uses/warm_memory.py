# SPDX-License-Identifier: Apache-2.0
"""`cryoci warm --to tmpfs`: images in memory, where nothing evicts them, for pulls and restores on this node.

They lie in a tmpfs of their own, which the kernel keeps within the limit; the last one that goes takes it along.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cryoci.command import run
from cryoci.errors import ConflictError, NotFoundError, PrivilegeError, SpaceError, UsageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import image, nearby, stores
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.transfer import CopyResult
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.hostmemory import available_memory

SHARE = 4  # without --limit, warm images may take this part of the node's memory: a quarter
_RESERVE = 20  # of the node's memory, a twentieth stays free
_OVERHEAD = 1 << 20  # bytes of manifests, signatures and directories of an image


@dataclass(frozen=True)
class Held:
    """An image in memory; `size` bytes, blobs that others share included."""

    reference: str
    digest: str
    size: int


@dataclass(frozen=True)
class Usage:
    """All images in memory: bytes they take, and may take."""

    images: tuple[Held, ...]
    used: int
    limit: int


def put(
    ref: LayoutRef | RegistryRef,
    limit: int | None,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
) -> CopyResult:
    """Bring an image into memory, every blob verified. `limit` bytes for all of them; None: as it was, or a quarter.

    Raises SpaceError when they would take more than the limit or the node is short of memory, UsageError,
    PrivilegeError, NotFoundError, IntegrityError, RegistryError; then nothing of it is kept.
    """
    place = nearby.place(ref)
    if place is None:
        raise UsageError(
            f"{ref} is in no store of this node's", hint="give NAME of the local store, or HOST/REPO:TAG"
        )
    origin = stores.open_source(ref, registry_options)
    found = stores.resolve(origin, stores.source_name(ref, origin))
    name = (ref.name if isinstance(ref, LayoutRef) else ref.tag) or found.top.digest.removeprefix("sha256:")[
        :12
    ]
    with _locked():
        try:
            _mount(limit)
            known = Layout(place) if (place / "oci-layout").is_file() else None
            parts = {part.digest: part.size for part in (found.manifest.config, *found.manifest.layers)}
            _check(ref, sum(n for one, n in parts.items() if known is None or not known.has_blob(one, n)))
            local = LayoutRef(place, name)
            return image.copy(ref, local, progress=progress, registry_options=registry_options)
        finally:
            _tidy()


def usage() -> Usage:
    """What is in memory."""
    images = []
    for layout in _layouts():
        source = nearby.source(layout.path)
        for entry in layout.entries():
            name = entry.annotations.get(families.REF_NAME, entry.digest)
            told = f"{source}:{name}" if source else name
            images.append(Held(told, entry.digest, image.inspect(LayoutRef(layout.path, name)).size))
    if not os.path.ismount(nearby.base()):
        return Usage((), 0, 0)
    space = os.statvfs(nearby.base())
    whole = space.f_blocks * space.f_frsize
    return Usage(tuple(images), whole - space.f_bfree * space.f_frsize, whole)


def drop(refs: list[LayoutRef | RegistryRef] | None) -> list[str]:
    """Take images out of memory, all of them without `refs`; returns their names. Raises NotFoundError."""
    with _locked():
        gone = [held.reference for held in usage().images]
        if refs is None:
            for layout in _layouts():
                shutil.rmtree(layout.path)
        else:
            gone = [_untag(ref) for ref in refs]
        _tidy()
    return gone


def _untag(ref: LayoutRef | RegistryRef) -> str:
    place = nearby.place(ref)
    name = (ref.name if isinstance(ref, LayoutRef) else ref.tag) or ref.digest or "latest"
    if place is None or not (place / "oci-layout").is_file():
        raise NotFoundError(f"{ref} is not warm", hint="see `cryoci warm --list`")
    layout = Layout(place)
    layout.untag(name)
    layout.collect()
    return str(ref)


def _layouts() -> list[Layout]:
    found = sorted(nearby.base().rglob(f"{nearby.IMAGES}/oci-layout")) if nearby.base().is_dir() else []
    return [Layout(marker.parent) for marker in found]


def _check(ref: LayoutRef | RegistryRef, need: int) -> None:
    need += _OVERHEAD
    space = os.statvfs(nearby.base())
    free, whole = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    if need > free:
        raise SpaceError(
            f"{ref} takes {need >> 20} MiB, and of the {whole >> 20} MiB for images in memory {free >> 20} are free",
            hint="drop others (cryoci warm --drop REF), or give a larger --limit",
        )
    available, reserve = available_memory(), _total() // _RESERVE
    spare = max(0, available - reserve)
    if need > spare:
        raise SpaceError(
            f"{ref} takes {need >> 20} MiB of memory, and this node has {spare >> 20} MiB to give "
            f"({available >> 20} available, of which {reserve >> 20} stay free)",
            hint="warm it --to cache, which the kernel may evict, or stop what needs the memory",
        )


def _total() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _mount(limit: int | None) -> None:
    """The tmpfs, of that size. Raises PrivilegeError, SpaceError, ToolError."""
    if os.geteuid() != 0:
        raise PrivilegeError("images in memory are kept in a tmpfs, which root mounts", hint="use sudo")
    place = nearby.base()
    if os.path.ismount(place):
        if limit is not None:
            used = usage().used
            if limit < used:
                raise SpaceError(
                    f"warm images take {used >> 20} MiB of memory, more than --limit {limit >> 20}M",
                    hint="drop some: cryoci warm --drop REF",
                )
            run(["mount", "-o", f"remount,size={limit}", place])
        return
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = f"size={limit or _total() // SHARE},mode=0700,nosuid,nodev,noexec"
    run(["mount", "-t", "tmpfs", "-o", options, "cryoci-warm", place])


def _tidy() -> None:
    """Remove layouts that have become empty, and the tmpfs with the last of them."""
    for layout in _layouts():
        if not layout.entries():
            shutil.rmtree(layout.path)
    place = nearby.base()
    if not _layouts() and os.path.ismount(place):
        # a restore may still read from what was dropped: it keeps the memory until it is done
        run(["umount", "--lazy", place], check=False)


@contextmanager
def _locked() -> Iterator[None]:
    """One at a time: the mount belongs to all. Raises ConflictError."""
    file = nearby.base().with_name("warm.lock")
    try:
        file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except PermissionError as e:
        raise PrivilegeError("images in memory are root's", hint="use sudo") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConflictError(
                "another `cryoci warm` is at work on the images in memory", hint="try again when it is done"
            ) from e
        yield
    finally:
        os.close(fd)
