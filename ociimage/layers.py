# SPDX-License-Identifier: Apache-2.0
"""Layers: files become a compressed tar in one pass, and back, in bounded memory.

A layer is a deterministic tar cut into frames of 2 MiB, each compressed on its own: a legal zstd (or
gzip) stream for every consumer, while both directions run on several threads. At level 1 the size
is that of larger frames (measured: within 0.02 %), memory stays small, and the allocator reuses its pages.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoci.errors import ImageError, UsageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, manifest, tar, zstd
from cryoci.ociimage.frames import Made, Pass, Pool

FRAME = 2 << 20  # bytes of tar per compressed frame
BULK_SIZE = 8 << 20  # bytes from which any file is a layer of its own
SHARED = 32  # layers that chunks of memory get, however many other files there are
MAX_LAYERS = 100  # overlayfs stops at about 127 lower directories in container storage
_CHUNK = re.compile(r"checkpoint/cryoci-memory-([0-9]{1,7})-([0-9a-f]{1,16})\.img\Z")


@dataclass(frozen=True)
class Compression:
    """A codec and its level; `parse` reads "zstd:1", "gzip:6", "none" or "auto".

    `auto`: zstd, whose level follows the store (adaptive.py); `level` is where it starts.
    """

    codec: str = "zstd"
    level: int = 1
    auto: bool = False

    @staticmethod
    def parse(text: str) -> Compression:
        """Raises UsageError for an unknown codec or a level that it does not have."""
        if text == "auto":
            return Compression(auto=True)
        codec, colon, level = text.partition(":")
        bounds = {"zstd": (-50, 19, 1), "gzip": (1, 9, 6), "none": (0, 0, 0)}.get(codec)
        if bounds is None or (colon and not level.lstrip("-").isdigit()):
            raise UsageError(
                f"unknown compression {text!r}", hint="use auto, zstd:1, zstd:LEVEL, gzip:LEVEL or none"
            )
        number = int(level) if colon else bounds[2]
        if not bounds[0] <= number <= bounds[1]:
            raise UsageError(f"{codec} has no level {number}", hint=f"use {bounds[0]} to {bounds[1]}")
        return Compression(codec, number)

    @property
    def media_type(self) -> str:
        """The layer media type that says so."""
        types = {"zstd": manifest.LAYER_ZSTD, "gzip": manifest.LAYER_GZIP, "none": manifest.LAYER_TAR}
        return types[self.codec]

    def compressor(self, level: int | None = None) -> Callable[[memoryview], bytes]:
        """A function that makes one complete frame of one buffer; one per thread."""
        if self.codec == "zstd":
            return zstd.frame_compressor(self.level if level is None else level)
        if self.codec == "gzip":
            return lambda data: zlib.compress(data, self.level, 31)
        return bytes


@dataclass(frozen=True)
class Plan:
    """What one layer will hold: `title` is "metadata" or the name of its one file."""

    title: str
    files: tuple[archive.File, ...]
    folders: tuple[str, ...] = ()
    has_parent: bool = False

    @property
    def annotations(self) -> dict[str, str]:
        """What its descriptor says of it."""
        return {
            families.LAYER_KIND: self.title,
            families.LAYER_RAW_SIZE: str(self.raw_size),
            families.TITLE: self.title,
        }

    @property
    def raw_size(self) -> int:
        """Bytes of the layer's tar, from names and sizes alone."""
        heads = sum(len(head) for head, _ in self.members())
        return heads + sum(f.size + -f.size % tar.BLOCK for f in self.files) + len(tar.END)

    def members(self) -> Iterator[tuple[bytes, archive.File | None]]:
        """Headers in order, each with the file whose data follows it."""
        for folder in self.folders:
            yield tar.header(f"{folder}/", 0, tar.DIRECTORY), None
        for file in self.files:
            yield tar.header(file.name, file.size), file
        if self.has_parent:
            yield tar.header(archive.PARENT, 0, tar.SYMLINK, archive.PARENT_TARGET), None


def plan(checkpoint: archive.Checkpoint, kept: Collection[str] = (), taken: int = 0) -> list[Plan]:
    """One small layer of metadata, then one for each bulk file, so that these move in parallel.

    What is too many for layers of their own shares some. `kept` names files that lie in `taken` more layers of the
    image already.
    """
    bulk = [f for f in checkpoint.files if _is_bulk(f) and f.name not in kept]
    chunks = sorted((f for f in bulk if _is_chunk(f)), key=_place)
    own = sorted((f for f in bulk if not _is_chunk(f)), key=lambda f: (-f.size, f.name))
    room = MAX_LAYERS - 1 - taken
    crowd: list[archive.File] = []
    if len(own) + bool(chunks) > room:
        alone = room - 1 - min(SHARED, len(chunks), room // 2)
        own, crowd = own[:alone], own[alone:]
    memory = _neighbours(chunks, room - len(own) - bool(crowd))
    small = tuple(f for f in checkpoint.files if not _is_bulk(f))
    plans = [Plan("metadata", small, checkpoint.folders, checkpoint.has_parent)]
    if crowd:
        files = tuple(sorted(crowd, key=lambda f: f.name))
        plans.append(Plan("rest", files, folders_of([f.name for f in files])))
    for files in memory:
        more = f" +{len(files) - 1}" if len(files) > 1 else ""
        plans.append(Plan(files[0].name + more, files, folders_of([f.name for f in files])))
    return plans + [Plan(f.name, (f,), folders_of((f.name,))) for f in sorted(own, key=lambda f: f.name)]


def most_kept(checkpoint: archive.Checkpoint) -> int:
    """How many layers of another image there may be beside those that `plan` needs at least."""
    others = sum(_is_bulk(f) and not _is_chunk(f) for f in checkpoint.files)
    return MAX_LAYERS - 1 - min(SHARED, others + 1)


def _neighbours(chunks: Sequence[archive.File], most: int) -> list[tuple[archive.File, ...]]:
    """At most so many layers of chunks that follow each other, since these change together.

    Each chunk of BULK_SIZE or more has one of its own if there is room; else all layers have about the same size.
    """
    if not chunks:
        return []
    goal = BULK_SIZE
    while True:
        layers: list[list[archive.File]] = []
        size = 0
        for file in chunks:
            if not layers or size + file.size > goal:
                layers.append([])
                size = 0
            layers[-1].append(file)
            size += file.size
        if len(layers) <= most:
            return [tuple(layer) for layer in layers]
        goal += max(goal // 8, 1)


def _is_bulk(file: archive.File) -> bool:
    named = file.name in archive.BULK or file.name.startswith("volumes/") or _is_chunk(file)
    return named or file.size >= BULK_SIZE


def _is_chunk(file: archive.File) -> bool:
    """A chunk of memory (docs/memory.md): many of one checkpoint, and of any size."""
    return bool(_CHUNK.match(file.name))


def _place(file: archive.File) -> tuple[int, int]:
    """Process and address of a chunk of memory."""
    match = _CHUNK.match(file.name)
    assert match
    return int(match[1]), int(match[2], 16)


def folders_of(names: Sequence[str]) -> tuple[str, ...]:
    """The folders that files of these names lie in."""
    return tuple(sorted({name.partition("/")[0] for name in names if "/" in name}))


class Writer:
    """A layer to be written: `open` may be called again when a transfer must start over.

    After `open` is exhausted, `diff_id` is the sha256 digest of the uncompressed tar; empty without
    compression, where it is the digest of what `open` gave, and without `with_diff_id`. `advance` hears
    of its bytes as they pass. `fd` is the plan's one file where that has no name in `directory`.
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        pool: Pool,
        advance: Callable[[int], None],
        *,
        with_diff_id: bool = True,
        fd: int | None = None,
    ) -> None:
        self.plan = plan
        self._fd = fd
        # what is not compressed has one digest, and whoever stores it computes that anyway
        self._digested = with_diff_id and pool.compression.codec != "none"
        self.diff_id = ""
        self._advance = advance
        self._shown = 0
        self._directory = directory
        self._pool = pool

    def open(self) -> Iterator[bytes]:
        """Compressed frames in order. Raises ImageError when a file changes under our hands, OSError."""
        run = Pass(self._pool, self._frames(), digested=self._digested)
        self._advance(-self._shown)
        self._shown = 0
        pending: deque[Future[Made | None]] = deque()
        try:
            while True:
                while len(pending) < self._pool.depth:  # those that are done wait to be sent
                    pending.append(run.begin())
                began = time.monotonic()
                made = pending.popleft().result()
                if made is None:
                    break
                had = time.monotonic()
                self._shown += made.size
                self._advance(made.size)
                yield made.data
                if self._pool.gauge is not None:
                    self._pool.gauge.note((had - began) * made.share, time.monotonic() - had)
        finally:
            run.close()
        self.diff_id = run.digest() if self._digested else ""

    def _frames(self) -> Generator[tuple[memoryview, bytearray]]:
        """The tar in buffers of FRAME bytes, taken from those that are spare so that pages are touched only once."""
        buffer, used = self._buffer(), 0
        for fill in self._pieces():
            while True:
                used += fill(memoryview(buffer)[used:])
                if used < FRAME:
                    break
                yield memoryview(buffer), buffer
                buffer, used = self._buffer(), 0
        if used:
            yield memoryview(buffer)[:used], buffer

    def _buffer(self) -> bytearray:
        try:
            return self._pool.spare.pop()
        except IndexError:
            return bytearray(FRAME)

    def _pieces(self) -> Iterator[Callable[[memoryview], int]]:
        for head, file in self.plan.members():
            yield _Bytes(head)
            if file is not None:
                with self._opened(file) as source:
                    yield source
                yield _Bytes(tar.padding(file.size))
        yield _Bytes(tar.END)

    def _opened(self, file: archive.File) -> _opened:
        if self._fd is None:
            return _opened(self._directory / file.name, file.size)
        # opened anew: a transfer that starts over reads it from its first byte
        return _opened(Path(f"/proc/self/fd/{self._fd}"), file.size, os.O_RDONLY | os.O_CLOEXEC)


class _Bytes:
    """Fills buffers from bytes; returns less than the room only at the end."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def __call__(self, room: memoryview) -> int:
        n = min(len(room), len(self._rest))
        room[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n


class _opened:
    """Fills buffers from a file of a promised size; returns less than the room only at the end."""

    def __init__(
        self, path: Path, size: int, flags: int = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    ) -> None:
        self._path, self._left = path, size
        self._fd = os.open(path, flags)
        if os.fstat(self._fd).st_size != size:
            os.close(self._fd)
            raise ImageError(f"{path} changed its size while it was packed")
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __enter__(self) -> _opened:
        return self

    def __exit__(self, *exc: Any) -> None:
        os.close(self._fd)

    def __call__(self, room: memoryview) -> int:
        done = 0
        while done < len(room) and self._left:
            n = os.readv(self._fd, [room[done : done + self._left]])
            if n == 0:
                raise ImageError(f"{self._path} became shorter while it was packed")
            done += n
            self._left -= n
        return done
