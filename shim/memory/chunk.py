# SPDX-License-Identifier: Apache-2.0
"""Chunk files: the pages of one range of one process' addresses, without those that are absent or zero.

    0   8   magic "CRYOCIMC"            40  8   pages stored
    8   4   version, 1                  48  8   offset of the first page, a multiple of the page size
    12  4   page size                   56  4   kind of the digest: 0 none, 1 sha256, 2 XXH3 of 128 bits
    16  8   pid in the container        60  4   0
    24  8   first address               64  32  digest, then zeros, of: pages, the 64 bytes before, bitmap
    32  8   pages in the range          96  ..  bitmap, lowest bit first: which pages are stored

Little endian. The pages follow in the order of their addresses; the file ends with the last one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryoci.errors import ImageError, IntegrityError
from cryoci.shim.memory import calls, sums
from cryoci.shim.memory.calls import PAGE, Run

MAGIC, VERSION = b"CRYOCIMC", 1
PIECE = 1 << 20  # bytes moved at once: stays in a core's second cache
MAX_PAGES = 1 << 20  # of one chunk
_HEAD = struct.Struct("<8sIIQQQQQII")
_DIGEST = _HEAD.size
_BITMAP = _DIGEST + 32
_RUN = re.compile(b"\x01+")
_ONES = bytes.maketrans(b"\x00\x01", b"01")
_FLAGS = bytes.maketrans(b"01", b"\x00\x01")
_ZERO = bytes(PAGE)


@dataclass(frozen=True)
class Key:
    """What a chunk holds: `pages` pages of process `vpid` from `start` on."""

    vpid: int
    start: int
    pages: int

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"cryoci-memory-{self.vpid}-{self.start:x}.img"

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE


@dataclass(frozen=True)
class Written:
    """What a capture has stored: bytes of pages, and the chunk's digest (hex, empty when not asked for)."""

    key: Key
    stored: int
    digest: str


class Buffer:
    """A piece of memory of one thread, and its address for system calls."""

    def __init__(self) -> None:
        import ctypes

        self.map = mmap.mmap(-1, PIECE)
        self.view = memoryview(self.map)
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)


def capture(
    directory: int,
    key: Key,
    pid: int,
    pagemap: int,
    buffer: Buffer,
    *,
    kind: int,
    direct: bool = False,
    passed: Callable[[int], None] = lambda n: None,
) -> Written:
    """Write the chunk `key` of process `pid` to the directory open as `directory`, durably.

    `direct`: its pages go past the page cache, for which the file system must take O_DIRECT. The rest as `store`.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(key.name, flags | (os.O_DIRECT if direct else 0), 0o600, dir_fd=directory)
    try:
        written = store(fd, key, pid, pagemap, buffer, kind=kind, passed=passed)
        os.fsync(fd)
        return written
    finally:
        os.close(fd)


def store(
    fd: int,
    key: Key,
    pid: int,
    pagemap: int,
    buffer: Buffer,
    *,
    kind: int,
    passed: Callable[[int], None] = lambda n: None,
) -> Written:
    """Write the chunk `key` of process `pid` to the empty file `fd`; `kind` is of its digest.

    `passed` is told of bytes that were read. Raises OSError, UnsupportedError.
    """
    flags = bytearray(key.pages)
    first = data_offset(key.pages)
    at = first
    sum_ = sums.new(kind)
    for runs, size in batches(calls.present(pagemap, key.start, key.end)):
        if calls.read(pid, runs, buffer.address) != size:
            raise OSError(14, f"memory of process {pid} cannot be read")
        parts = [buffer.view[begin:end] for begin, end in _keep(runs, size, key.start, flags, buffer)]
        if sum_ is not None:
            for part in parts:
                sum_.update(part)
        at = _write(fd, parts, at)
        passed(size)
    stored = (at - first) // PAGE
    if stored != flags.count(1) or len(flags) != key.pages:
        raise OSError(14, f"the kernel's account of the memory of process {pid} contradicts itself")
    head = _HEAD.pack(MAGIC, VERSION, PAGE, key.vpid, key.start, key.pages, stored, first, kind, 0)
    bitmap = _pack(flags)
    digest = b""
    if sum_ is not None:
        sum_.update(head)
        sum_.update(bitmap)
        digest = sum_.digest()
    # the head is no whole page
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    _write(fd, [memoryview(head + digest.ljust(32, b"\0") + bitmap)], 0)
    if stored == 0:
        os.ftruncate(fd, first)
    return Written(key, stored * PAGE, digest.hex())


class Reader:
    """A chunk file in an open directory, or open as `fd`, checked against what it should be. Use as a context manager.

    Raises ImageError when the file is none or another one's, IntegrityError from `pieces` at its end when the
    bytes are not those that were written; what was read until then is not to be used.
    """

    def __init__(self, directory: int, key: Key, digest: str, fd: int = -1) -> None:
        self.key = key
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.fd = os.open(key.name, flags, dir_fd=directory) if fd < 0 else fd
        except OSError as e:
            raise ImageError(f"{key.name} of the checkpoint cannot be read: {e.strerror}") from e
        try:
            self._open(digest)
        except BaseException:
            os.close(self.fd)
            raise

    def _open(self, digest: str) -> None:
        key = self.key
        length = _BITMAP + -(-key.pages // 8)
        raw = os.pread(self.fd, length, 0)
        expected = (MAGIC, VERSION, PAGE, key.vpid, key.start, key.pages)
        if len(raw) < length or _HEAD.unpack_from(raw)[:6] != expected:
            raise ImageError(f"{key.name} of the checkpoint is not the chunk of memory that it should be")
        self.stored, self.offset, self._kind, rest = _HEAD.unpack_from(raw)[6:]
        self._head, self._bitmap = raw[:_DIGEST], raw[_BITMAP:]
        length = sums.SIZES.get(self._kind, 0)
        self._digest = raw[_DIGEST : _DIGEST + length].hex()
        flags = _unpack(self._bitmap, key.pages)
        self.runs = [
            (key.start + m.start() * PAGE, (m.end() - m.start()) * PAGE) for m in _RUN.finditer(flags)
        ]
        pages = sum(size for _, size in self.runs) // PAGE
        size = os.fstat(self.fd).st_size
        known = self._kind in sums.SIZES and not any(raw[_DIGEST + length : _BITMAP])
        if (pages, self.offset, rest) != (self.stored, data_offset(key.pages), 0) or not known:
            raise ImageError(f"{key.name} of the checkpoint is damaged: its parts disagree")
        if size != self.offset + pages * PAGE:
            raise ImageError(
                f"{key.name} of the checkpoint is cut off: it has {size} of {self.offset + pages * PAGE} bytes"
            )
        if digest != self._digest:
            raise IntegrityError(f"{key.name} of the checkpoint belongs to another checkpoint")

    def pieces(self, buffer: Buffer) -> Iterator[tuple[list[Run], int]]:
        """Runs of addresses and their bytes' total, which then lie in `buffer`."""
        at = self.offset
        sum_ = sums.new(self._kind)
        for runs, size in batches(self.runs):
            done = os.preadv(self.fd, [buffer.view[:size]], at)
            if done != size:
                raise ImageError(f"{self.key.name} of the checkpoint is cut off")
            if sum_ is not None:
                sum_.update(buffer.view[:size])
            at += size
            yield runs, size
        if sum_ is not None:
            sum_.update(self._head)
            sum_.update(self._bitmap)
            if sum_.digest().hex() != self._digest:
                raise IntegrityError(f"{self.key.name} of the checkpoint is damaged: its digest is another")

    def check(self, buffer: Buffer | None = None) -> None:
        """Read all of it. Raises IntegrityError, ImageError."""
        for _ in self.pieces(buffer or Buffer()):
            pass

    def same(self, pid: int, pagemap: int, buffer: Buffer, other: Buffer) -> bool:
        """Whether process `pid`, which does not run, holds just what the file does. Raises OSError."""
        key, at = self.key, self.offset
        flags = bytearray(key.pages)
        for runs, size in batches(calls.present(pagemap, key.start, key.end)):
            if calls.read(pid, runs, buffer.address) != size:
                raise OSError(14, f"memory of process {pid} cannot be read")
            for begin, end in _keep(runs, size, key.start, flags, buffer):
                if os.preadv(self.fd, [other.view[: end - begin]], at) != end - begin:
                    return False
                if not calls.equal(buffer.address + begin, other.address, end - begin):
                    return False
                at += end - begin
        return len(flags) == key.pages and _pack(flags) == self._bitmap

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def data_offset(pages: int) -> int:
    """Where the pages begin in the file of a chunk of so many."""
    return -(-(_BITMAP + -(-pages // 8)) // PAGE) * PAGE


def batches(runs: list[Run]) -> Iterator[tuple[list[Run], int]]:
    """Cut runs so that each batch fits a buffer and one system call; with the batch's bytes."""
    batch: list[Run] = []
    total = 0
    for start, size in runs:
        while size:
            part = min(size, PIECE - total)
            batch.append((start, part))
            total += part
            start += part
            size -= part
            if total == PIECE or len(batch) == calls.IOV_MAX:
                yield batch, total
                batch, total = [], 0
    if batch:
        yield batch, total


def _keep(runs: list[Run], size: int, base: int, flags: bytearray, buffer: Buffer) -> list[tuple[int, int]]:
    """Mark the pages that are not all zero in `flags`; returns where they lie in the buffer."""
    zero = _zero_pages(buffer, size)
    at = 0
    for start, length in runs:
        first, pages = (start - base) // PAGE, length // PAGE
        flags[first : first + pages] = b"\x01" * pages
        if zero:
            for page in range(at // PAGE, at // PAGE + pages):
                if page in zero:
                    flags[first + page - at // PAGE] = 0
        at += length
    if not zero:
        return [(0, size)]
    kept: list[tuple[int, int]] = []
    begin = 0
    for page in sorted(zero):
        if begin < page * PAGE:
            kept.append((begin, page * PAGE))
        begin = (page + 1) * PAGE
    if begin < size:
        kept.append((begin, size))
    return kept


def _zero_pages(buffer: Buffer, size: int) -> set[int]:
    """Which pages of the buffer are all zero: those of which two words are zero are looked at whole."""
    words = buffer.view[:size].cast("Q")
    step = PAGE // 8
    first = words[::step].tobytes()
    if bytes(8) not in first:  # as in most memory: seen without a loop that keeps other threads waiting
        return set()
    some = [
        index
        for index, pair in enumerate(
            zip(struct.iter_unpack("Q", first), words[step // 2 :: step].tolist(), strict=True)
        )
        if pair == ((0,), 0)
    ]
    return {page for page in some if buffer.map[page * PAGE : (page + 1) * PAGE] == _ZERO}


def _pack(flags: bytearray) -> bytes:
    digits = bytes(flags[::-1]).translate(_ONES)
    return int(digits, 2).to_bytes(-(-len(flags) // 8), "little")


def _unpack(bitmap: bytes, pages: int) -> bytes:
    digits = f"{int.from_bytes(bitmap, 'little'):0{pages}b}".encode()
    if len(digits) != pages:
        raise ImageError("a chunk of memory marks pages beyond its end")
    return digits.translate(_FLAGS)[::-1]


def _write(fd: int, parts: list[memoryview], at: int) -> int:
    """Write all parts one after another; returns where they end."""
    while parts:
        done = os.pwritev(fd, parts[: calls.IOV_MAX], at)
        at += done
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if done:
            parts[0] = parts[0][done:]
    return at
