# SPDX-License-Identifier: Apache-2.0
"""CRIU's image files: two magic numbers, then messages, each after its length (criu images/*.proto, v4.2).

    IMAGE ::= COMMON_MAGIC MAGIC { SIZE MESSAGE }    little endian u32; statistics have SERVICE_MAGIC first

They come from strangers, so all that is counted here is bounded, and damage raises ImageError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from cryoci.errors import ImageError
from cryoci.ociimage import archive
from cryoci.protobuf import Message

COMMON, SERVICE = 0x54564319, 0x55105940
MAGICS = {
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "core": 0x55053847,
    "mm": 0x57492820,
    "pagemap": 0x56084025,
    "fdinfo": 0x56213732,
    "files": 0x56303138,
    "fs": 0x51403912,
    "ids": 0x54432030,
    "mountpoints": 0x55563928,
    "utsns": 0x54473203,
    "stats": 0x57093306,
    "tty-info": 0x59453036,
}
MAX_IMAGE = 256 << 20  # bytes of one image that is read as a whole
MAX_MESSAGES = 20_000_000  # of one image


class Images(Protocol):
    """Where image files come from: a directory, or what was kept of a stream."""

    def names(self) -> frozenset[str]:
        """Names of all files, relative to the checkpoint: `checkpoint/core-1.img`, ..."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file."""

    def read(self, name: str) -> bytes:
        """A file of at most MAX_IMAGE bytes. Raises ImageError."""


class DirectoryImages:
    """CRIU's images in a checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sizes: dict[str, int] = {}
        for folder in (directory, *(directory / name for name in archive.FOLDERS)):
            if folder.is_dir() and not (folder != directory and folder.is_symlink()):
                for file in folder.iterdir():
                    if file.is_file() and not file.is_symlink():
                        self._sizes[str(file.relative_to(directory))] = file.stat().st_size
        self._names = frozenset(self._sizes)

    def names(self) -> frozenset[str]:
        return self._names

    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    def read(self, name: str) -> bytes:
        return archive.read(self._directory / name, MAX_IMAGE)


def messages(data: bytes, kind: str, name: str) -> Iterator[Message]:
    """The messages of an image of that kind; `name` is for errors. Raises ImageError."""
    for payload in payloads(data, kind, name):
        try:
            yield Message(payload)
        except ImageError as e:
            raise ImageError(f"{name}: {e.message}") from e


def payloads(data: bytes, kind: str, name: str) -> Iterator[memoryview]:
    """The bytes of each message."""
    view = memoryview(data)
    first = COMMON if kind != "stats" else SERVICE
    if len(view) < 8 or _u32(view, 0) != first or _u32(view, 4) != MAGICS[kind]:
        raise ImageError(f"{name} is no CRIU image of kind {kind}, or of a CRIU that is not known")
    at, count = 8, 0
    while at < len(view):
        size = _u32(view, at) if len(view) - at >= 4 else MAX_IMAGE
        at += 4
        count += 1
        if size > len(view) - at or count > MAX_MESSAGES:
            raise ImageError(f"{name} is damaged: it ends in the middle of a message")
        yield view[at : at + size]
        at += size


def one(images: Images, name: str, kind: str) -> Message:
    """The first message of an image; an empty one when the image is not there or holds none."""
    if name not in images.names():
        return Message(b"")
    return next(messages(images.read(name), kind, name), Message(b""))


def _u32(view: memoryview, at: int) -> int:
    return int.from_bytes(view[at : at + 4], "little")
