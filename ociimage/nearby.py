# SPDX-License-Identifier: Apache-2.0
"""Blobs that `cryoci warm --to tmpfs` keeps in memory: who reads one from its store reads it there.

    /run/cryoci/warm/HOST/REPOSITORY/_images     a layout for each repository of a registry
    /run/cryoci/warm/_store/_images              that of the local store

A blob counts only for the store that it came from, so that nobody gets at one by a manifest of his own. It is
verified by whoever reads it, as the store's would be.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cryoci.ociimage import reference
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.reference import LayoutRef, RegistryRef

IMAGES = "_images"  # no part of a repository's name begins so
_STORE = "_store"
_CHUNK = 1 << 20  # bytes of one read


def base() -> Path:
    """Where warm images are: a tmpfs of their own, when there are any."""
    return Path(os.environ.get("CRYOCI_RUN") or "/run/cryoci") / "warm"


def place(ref: LayoutRef | RegistryRef) -> Path | None:
    """The layout in memory for images of the store of `ref`; None for layouts that are not the local store."""
    if isinstance(ref, RegistryRef):
        return of_repository(ref.host, ref.repository)
    return of_layout(ref.path)


def of_repository(host: str, repository: str) -> Path:
    """The layout in memory for a repository of a registry."""
    return base() / host / repository / IMAGES


def of_layout(path: Path) -> Path | None:
    """The layout in memory for the layout at `path`, if that is the local store."""
    return base() / _STORE / IMAGES if path == reference.default_store() else None


def source(layout: Path) -> str:
    """HOST/REPOSITORY of a layout in memory; empty for the local store's."""
    words = str(layout.parent.relative_to(base()))
    return "" if words == _STORE else words


def chunks(layout: Path | None, descriptor: Descriptor, start: int = 0) -> Iterator[bytes] | None:
    """A blob's bytes from `start` on out of a layout in memory, not verified; None when it is not there."""
    algorithm, _, name = descriptor.digest.partition(":")
    if layout is None or algorithm != "sha256" or not name.isalnum():
        return None
    try:
        fd = os.open(
            layout / "blobs/sha256" / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except OSError:
        return None
    file = os.fdopen(fd, "rb", buffering=0)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != descriptor.size:
        file.close()
        return None
    file.seek(start)
    return _read(file)


def _read(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk
