# SPDX-License-Identifier: Apache-2.0
"""Are the memory images whole? CRIU does not ask: on a short pages file its restorer reads nothing for ever.

A pagemap image names its pages file and lists runs of pages; those marked present lie there one after
another (criu/pagemap.c, images/pagemap.proto):

    IMAGE ::= COMMON_MAGIC PAGEMAP_MAGIC { SIZE MESSAGE }     little endian u32, protobuf
    head  ::= 1: pages_id
    entry ::= 1: vaddr  2: nr_pages (old)  3: in_parent  4: flags  5: nr_pages
"""

import os
from collections.abc import Iterator

from cryoci.errors import ImageError
from cryoci.protobuf import varint

_COMMON, _PAGEMAP = 0x54564319, 0x56084025
_PRESENT = 4  # PE_PRESENT; without flags (CRIU 3) present is what is not in the parent
_LIMIT = 512 << 20  # bytes of one pagemap image: 2 TB of memory in single pages
_PAGE = os.sysconf("SC_PAGE_SIZE")


def check(directory: str) -> None:
    """Raise ImageError when a pages file in `directory` is missing or shorter than its pagemap says."""
    needed: dict[int, int] = {}
    for name in sorted(os.listdir(directory)):
        if name.startswith("pagemap-") and name.endswith(".img"):
            pages_id, pages = _read(os.path.join(directory, name))
            # each pagemap has a pages file of its own; a second one is of an earlier dump (podman's --keep)
            needed[pages_id] = min(pages, needed.get(pages_id, pages))
    for pages_id, pages in needed.items():
        path = os.path.join(directory, f"pages-{pages_id}.img")
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            size = 0
        if size < pages * _PAGE:
            raise ImageError(
                f"{os.path.basename(path)} of the checkpoint is cut off: it has {size} of {pages * _PAGE} bytes",
                hint="the checkpoint is not usable: use another one (`cryoci list`)",
            )


def _read(path: str) -> tuple[int, int]:
    """(pages_id, pages present) of a pagemap image. Raises ImageError."""
    broken = ImageError(
        f"{os.path.basename(path)} of the checkpoint is damaged", hint="use another one (`cryoci list`)"
    )
    with open(path, "rb") as f:
        data = f.read(_LIMIT + 1)
    if len(data) > _LIMIT or int.from_bytes(data[4:8], "little") != _PAGEMAP:
        raise broken
    pages_id, pages = -1, 0
    try:
        for message in messages(data):
            fields = _numbers(message)
            if pages_id < 0:
                pages_id = fields[1]
            elif fields.get(4, 0 if fields.get(3) else _PRESENT) & _PRESENT:
                pages += fields.get(5) or fields.get(2, 0)
    except (ImageError, KeyError) as e:
        raise broken from e
    if pages_id < 0:
        raise broken
    return pages_id, pages


def _numbers(message: bytes) -> dict[int, int]:
    """Fields of a protobuf message of varints. Raises KeyError for other kinds, ImageError at the end."""
    fields: dict[int, int] = {}
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7:
            raise KeyError(key)
        fields[key >> 3], at = varint(message, at)
    return fields


def messages(data: bytes) -> Iterator[bytes]:
    """The messages of an image of COMMON_MAGIC, one after another. Raises ImageError when it is none, or cut off."""
    if int.from_bytes(data[:4], "little") != _COMMON:
        raise ImageError("what should be an image of CRIU is none")
    at = 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if len(data) - at < size:
            raise ImageError("an image of the checkpoint is cut off")
        yield data[at : at + size]
        at += size
