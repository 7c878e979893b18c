# SPDX-License-Identifier: Apache-2.0
"""The memory of a checkpointed process: what was mapped where (mm-PID.img) and which pages are stored.

pagemap-PID.img names a pages file and lists runs of pages; those marked present lie in it one after
another. Pages of an incremental dump's parent are looked up in pre-checkpoint/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryoci.errors import ImageError, NotFoundError, UsageError
from cryoci.ociimage.criu.image import Images, messages, one
from cryoci.protobuf import Message

PAGE = 4096  # of x86_64, and of every aarch64 kernel that CRIU is tested on
FOLDERS = ("checkpoint", "pre-checkpoint")
_PARENT, _PRESENT = 1, 4  # flags of pagemap_entry
MAX_PAGES = 1 << 40  # of one run: 4 PiB of memory
_PIECE = 4 << 20  # bytes read at once
_PROT = ((1, "r"), (2, "w"), (4, "x"))
_SHARED, _ANONYMOUS = 0x01, 0x20
_STATUS = ((1 << 5, "heap"), (1 << 1, "stack"), (1 << 3, "vdso"), (1 << 12, "vvar"), (1 << 2, "vsyscall"))


@dataclass(frozen=True)
class Area:
    """A mapping: addresses, rights such as "rw-", and what it is (anonymous, file, heap, ...)."""

    start: int
    end: int
    rights: str
    kind: str
    shared: bool


@dataclass(frozen=True)
class Run:
    """Pages that are stored: `count` of them from address `start`, at `offset` of file `pages`."""

    start: int
    count: int
    pages: str
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.count * PAGE


@dataclass(frozen=True)
class Layout:
    """The memory map of one process, as mm-PID.img has it."""

    areas: tuple[Area, ...]
    heap: int
    stack: int
    arguments: tuple[int, int]
    environment: tuple[int, int]
    program_id: int

    @property
    def virtual(self) -> int:
        """Bytes mapped."""
        return sum(area.end - area.start for area in self.areas)


@dataclass(frozen=True)
class Match:
    """Where something was found: address, the area's kind, and bytes around it."""

    address: int
    area: str
    found: bytes
    before: bytes
    after: bytes


def layout(images: Images, pid: int) -> Layout:
    """The memory map of a process; empty for a zombie, which has none. Raises ImageError."""
    mm = one(images, f"checkpoint/mm-{pid}.img", "mm")
    areas = [_area(vma) for vma in mm.messages(14)]
    return Layout(
        tuple(sorted(areas, key=lambda area: area.start)),
        max(0, mm.number(7) - mm.number(6)),
        mm.number(5),
        (mm.number(8), mm.number(9)),
        (mm.number(10), mm.number(11)),
        mm.number(12),
    )


def _area(vma: Message) -> Area:
    start, end = vma.number(1), vma.number(2)
    if not 0 <= start <= end < 1 << 64:
        raise ImageError("a memory area of the checkpoint ends before it starts")
    rights = "".join(letter if vma.number(5) & bit else "-" for bit, letter in _PROT)
    flags, status = vma.number(6), vma.number(7)
    kind = next((word for bit, word in _STATUS if status & bit), "")
    return Area(
        start, end, rights, kind or ("anonymous" if flags & _ANONYMOUS else "file"), bool(flags & _SHARED)
    )


def runs(images: Images, pid: int, folder: str = "checkpoint") -> list[Run]:
    """Stored pages of a process in order of address, those of the parent dump included. Raises ImageError."""
    name = f"{folder}/pagemap-{pid}.img"
    if name not in images.names():
        return []
    found: list[Run] = []
    parents: list[tuple[int, int]] = []
    pages = ""
    offset = 0
    for entry in messages(images.read(name), "pagemap", name):
        if not pages:
            pages = f"{folder}/pages-{entry.number(1)}.img"
            continue
        start, count = entry.number(1), entry.number(5) or entry.number(2)
        if count > MAX_PAGES or start % PAGE or start + count * PAGE > 1 << 64:
            raise ImageError(f"{name} is damaged: a run of {count} pages at {start:#x}")
        flags = entry.number(4, _PARENT if entry.number(3) else _PRESENT)
        if flags & _PRESENT:
            found.append(Run(start, count, pages, offset))
            offset += count * PAGE
        elif flags & _PARENT:
            parents.append((start, start + count * PAGE))
    if parents and folder == FOLDERS[0]:
        found += _within(runs(images, pid, FOLDERS[1]), parents)
    return sorted(found, key=lambda run: run.start)


def _within(older: Sequence[Run], spans: Sequence[tuple[int, int]]) -> Iterator[Run]:
    """The parts of `older` that lie in `spans`, both in order of address."""
    spans = sorted(spans)
    at = 0
    for run in older:
        while at < len(spans) and spans[at][1] <= run.start:
            at += 1
        for start, end in spans[at:]:
            if start >= run.end:
                break
            first, last = max(start, run.start), min(end, run.end)
            if first < last:
                yield Run(first, (last - first) // PAGE, run.pages, run.offset + first - run.start)


class Memory:
    """The bytes of a process; `directory` holds its pages files, `images` its descriptions."""

    def __init__(self, directory: Path, images: Images, pid: int) -> None:
        self._directory = directory
        self.layout = layout(images, pid)
        self.runs = runs(images, pid)
        if not self.runs and f"checkpoint/core-{pid}.img" not in images.names():
            raise NotFoundError(f"the checkpoint has no process {pid}", hint="see `cryoci inspect` for them")

    def pieces(self, start: int = 0, end: int = 1 << 64) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) of what is stored in a range, in order; neighbours may come apart."""
        for run in self.runs:
            first, last = max(start, run.start), min(end, run.end)
            if first < last:
                yield from self._read(run, first, last)

    def _read(self, run: Run, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        try:
            fd = os.open(self._directory / run.pages, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise ImageError(f"the checkpoint lacks {run.pages}, where its memory should be") from e
        try:
            at = first
            while at < last:
                data = os.pread(fd, min(_PIECE, last - at), run.offset + at - run.start)
                if not data:
                    raise ImageError(f"{run.pages} is cut off: the page at {at:#x} is missing")
                yield at, data
                at += len(data)
        finally:
            os.close(fd)

    def read(self, start: int, end: int, limit: int = 1 << 20) -> bytes:
        """The bytes from `start` to `end`, at most `limit`; what is not stored reads as zeros."""
        result = bytearray(min(max(0, end - start), limit))
        for address, data in self.pieces(start, start + len(result)):
            result[address - start : address - start + len(data)] = data
        return bytes(result)

    def area(self, address: int) -> str:
        """The kind of the area that an address lies in."""
        for area in self.layout.areas:
            if area.start <= address < area.end:
                return area.kind
        return ""

    def find(self, pattern: re.Pattern[bytes], *, context: int, overlap: int) -> Iterator[Match]:
        """Every match, also across runs that touch; matches are at most `overlap` bytes."""
        tail, tail_at, known = b"", 0, 0
        for address, data in self.pieces():
            if tail_at + len(tail) != address:
                tail, tail_at = b"", address
            window = tail + data
            for match in pattern.finditer(window):
                if match.end() == match.start() or tail_at + match.start() < known:
                    continue
                begin = tail_at + match.start()
                known = tail_at + match.end()
                # what a piece's end may have cut off belongs to the next round
                if match.end() == len(window) and len(match.group()) < overlap and len(window) > overlap:
                    known = begin
                    break
                yield Match(
                    begin,
                    self.area(begin),
                    match.group()[:overlap],
                    self.read(max(0, begin - context), begin),
                    self.read(known, known + context),
                )
            keep = min(len(window), overlap)
            if known > tail_at + len(window) - keep:
                keep = tail_at + len(window) - known
            tail, tail_at = window[len(window) - keep :], tail_at + len(window) - keep


def parse_range(text: str) -> tuple[int, int]:
    """ "START-END" in hexadecimal (as /proc/PID/maps), or "START+BYTES". Raises UsageError."""
    match = re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,16})(?:-(?:0x)?([0-9a-fA-F]{1,16})|\+(\d{1,12}))", text)
    if match:
        start = int(match[1], 16)
        end = int(match[2], 16) if match[2] else start + int(match[3])
        if start < end <= 1 << 64:
            return start, end
    raise UsageError(
        f"bad address range {text!r}", hint="write 7f0012340000-7f0012341000, or 7f0012340000+64"
    )
