# SPDX-License-Identifier: Apache-2.0
"""cryoci-memory.json: which memory of which process lies in which chunk files, beside CRIU's images.

    {"version": 1, "page_size": 4096,
     "processes": [{"pid": PID in the container, "areas": [["START", "END"], ...] in hex}],
     "chunks": [[PID, "START" in hex, PAGES, "digest in hex, or empty"], ...]}

Version 2 has "sources": [NAME, ...] as well, directories beside this checkpoint's; a chunk with a fifth element, a
number of these from 0 on, lies in that one (chain.py). Without such chunks version 1 is written.

Whoever made a checkpoint is not trusted: every number is checked before it is used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryoci.errors import ImageError, UnsupportedError
from cryoci.files import write_json
from cryoci.shim.memory import chunk, sums
from cryoci.shim.memory.calls import PAGE, Run
from cryoci.shim.memory.chunk import MAX_PAGES, Key

NAME = "cryoci-memory.json"
VERSION, CHAINED = 1, 2
FORMAT = f"{chunk.VERSION} {PAGE}"  # of chunk files: version and page size, as io.cryoci.memory.format of an image
MAX_SOURCES = 4096
_SOURCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@:+=,-]{0,254}\Z")
LIMIT = 64 << 20  # bytes of an index
_TOP = 1 << 47  # user addresses of x86-64 with four levels; five are never given out unasked


@dataclass(frozen=True)
class Index:
    """`areas` by pid in the container; `chunks` with their digests; `sources` of those that lie elsewhere."""

    areas: dict[int, tuple[Run, ...]]
    chunks: tuple[tuple[Key, str], ...]
    sources: Mapping[Key, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all areas."""
        return sum(size for runs in self.areas.values() for _, size in runs)


def exists(directory: str) -> bool:
    """Whether the images in `directory` have memory out of band."""
    return os.path.lexists(f"{directory}/{NAME}")


def is_source(name: str) -> bool:
    """Whether a directory of this name can be one of an index's sources: no path, nothing hidden."""
    return bool(_SOURCE.match(name))


def write(
    directory: str,
    areas: Mapping[int, Sequence[Run]],
    chunks: Iterable[tuple[Key, str]],
    sources: Mapping[Key, str] | None = None,
) -> None:
    """Write the index, durably. Raises OSError."""
    elsewhere = sources or {}
    names = sorted(set(elsewhere.values()))
    number = {name: [place] for place, name in enumerate(names)}
    value = {
        "version": CHAINED if names else VERSION,
        "page_size": PAGE,
        "processes": [
            {"pid": pid, "areas": [[f"{start:x}", f"{start + size:x}"] for start, size in runs]}
            for pid, runs in sorted(areas.items())
        ],
        "chunks": [
            [key.vpid, f"{key.start:x}", key.pages, digest, *number.get(elsewhere.get(key, ""), ())]
            for key, digest in sorted(chunks, key=lambda c: (c[0].vpid, c[0].start))
        ],
        **({"sources": names} if names else {}),
    }
    write_json(f"{directory}/{NAME}", value)


def read(directory: str) -> Index:
    """Read and check the index of the images in `directory`. Raises ImageError, UnsupportedError."""
    try:
        fd = os.open(f"{directory}/{NAME}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as f:
            raw = f.read(LIMIT + 1)
    except OSError as e:
        raise ImageError(f"{NAME} of the checkpoint cannot be read: {e}") from e
    return parse(raw)


def parse(raw: bytes) -> Index:
    """Check an index. Raises ImageError, UnsupportedError."""
    try:
        value = json.loads(raw) if len(raw) <= LIMIT else None
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{NAME} of the checkpoint cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise ImageError(f"{NAME} of the checkpoint is not an index of memory")
    if value.get("version") not in (VERSION, CHAINED) or type(value["version"]) is not int:
        raise UnsupportedError(
            f"{NAME} of the checkpoint is of version {str(value.get('version'))[:20]}, not {CHAINED} or less",
            hint="upgrade cryoci",
        )
    if value.get("page_size") != PAGE:
        raise UnsupportedError(
            f"the checkpoint's memory is in pages of {str(value.get('page_size'))[:20]} bytes, not {PAGE}",
            hint="restore it on a node like the one it was made on",
        )
    try:
        areas = {_pid(process["pid"]): _areas(process["areas"]) for process in value["processes"]}
        chunks = tuple((_key(*entry[:3]), _digest(entry[3])) for entry in value["chunks"])
        _check(areas, chunks)
        sources = _sources(value, chunks) if value["version"] == CHAINED else {}
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise ImageError(f"{NAME} of the checkpoint is damaged: {e}") from e
    return Index(areas, chunks, sources)


def _sources(value: dict[str, Any], chunks: Sequence[tuple[Key, str]]) -> dict[Key, str]:
    names = value["sources"]
    if not isinstance(names, list) or not 0 < len(names) <= MAX_SOURCES:
        raise ValueError("it has no sources, or too many")
    if not all(isinstance(name, str) and is_source(name) for name in names):
        raise ValueError("a source is no plain name")
    found = {}
    for (key, digest), entry in zip(chunks, value["chunks"], strict=True):
        if len(entry) < 5:
            continue
        if type(entry[4]) is not int or not 0 <= entry[4] < len(names) or not digest:
            raise ValueError("a chunk is of no source, or has no digest to know it by")
        found[key] = names[entry[4]]
    return found


def _check(areas: dict[int, tuple[Run, ...]], chunks: Sequence[tuple[Key, str]]) -> None:
    end: tuple[int, int] = (0, 0)
    for key, _ in chunks:
        if (key.vpid, key.start) < end:
            raise ValueError("chunks overlap")
        end = (key.vpid, key.end)
        if not any(start <= key.start and key.end <= start + size for start, size in areas[key.vpid]):
            raise ValueError("a chunk lies outside of its areas")


def _pid(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 22:
        raise ValueError("a pid is none")
    return value


def _areas(value: Any) -> tuple[Run, ...]:
    found = []
    last = 0
    for first, end in value:
        start, size = _address(first), _address(end) - _address(first)
        if size <= 0 or start < last:
            raise ValueError("areas overlap")
        last = start + size
        found.append((start, size))
    return tuple(found)


def _key(pid: Any, start: Any, pages: Any) -> Key:
    if type(pages) is not int or not 0 < pages <= MAX_PAGES:
        raise ValueError("a chunk has no pages, or too many")
    return Key(_pid(pid), _address(start), pages)


def _address(value: Any) -> int:
    if not isinstance(value, str) or len(value) > 16:
        raise ValueError("an address is none")
    address = int(value, 16)
    if address % PAGE or not 0 < address <= _TOP:
        raise ValueError("an address is none")
    return address


def _digest(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a digest is none")
    sums.check(value)
    return value
