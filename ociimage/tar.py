# SPDX-License-Identifier: Apache-2.0
"""tar: a deterministic header writer and a strict streaming reader.

The standard library's reader allocates whatever a PAX header's size field says and follows many dialects;
this one reads ustar, PAX and GNU long names with fixed bounds, from an iterator of chunks, without copying
file data. Format: POSIX.1-2001 pax, "ustar Interchange Format" and "pax Header Block".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cryoci.errors import ImageError

BLOCK = 512
MAX_META = 64 << 10  # bytes of one PAX header or GNU long name
MAX_HEAD = 4 * MAX_META  # bytes of all headers of one entry
MAX_ENTRIES = 1_000_000
FILE, HARDLINK, SYMLINK, DIRECTORY = b"0", b"1", b"2", b"5"
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "FIFO",
}
_USTAR_SIZE = 8 << 30  # the first size that 11 octal digits cannot hold
END = b"\0" * (2 * BLOCK)


def header(name: str, size: int, kind: bytes = FILE, link: str = "", mode: int | None = None) -> bytes:
    """One entry's header blocks: mtime, uid and gid 0, mode 0600 (directories 0700); PAX only if needed."""
    if mode is None:
        mode = 0o700 if kind == DIRECTORY else 0o600
    raw, records = name.encode(), b""
    if len(raw) > 100:
        records += _record("path", raw)
    if size >= _USTAR_SIZE:
        records += _record("size", str(size).encode())
    blocks = b""
    if records:
        blocks = _block(b"pax", len(records), b"x", b"", 0o600) + records + padding(len(records))
    return blocks + _block(raw[:100], size if size < _USTAR_SIZE else 0, kind, link.encode(), mode)


def padding(size: int) -> bytes:
    """The zeros that fill the last block of `size` bytes."""
    return b"\0" * (-size % BLOCK)


def _record(key: str, value: bytes) -> bytes:
    body = b" " + key.encode() + b"=" + value + b"\n"
    length = len(body) + 1
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def _block(name: bytes, size: int, kind: bytes, link: bytes, mode: int) -> bytes:
    head = (
        name.ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    )
    tail = kind + link.ljust(100, b"\0") + b"ustar\x0000" + b"\0" * 64 + b"0000000\0" * 2
    total = sum(head) + sum(tail) + 8 * 32
    return (head + b"%06o\0 " % total + tail).ljust(BLOCK, b"\0")


@dataclass(frozen=True)
class Entry:
    """One member: its name as stored, type flag, size in bytes and link target."""

    name: str
    kind: bytes
    size: int
    link: str

    @property
    def kind_name(self) -> str:
        """The kind in words."""
        return _KINDS.get(self.kind, f"entry of type {self.kind!r}")


class Reader:
    """Entries of a tar that arrives in chunks; an entry's data must be taken with `data` before the next."""

    def __init__(self, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        self._chunks = iter(chunks)
        self._view = memoryview(b"")
        self._left = 0  # bytes of the current entry not taken yet
        self.head = b""  # the header blocks of the current entry

    def __iter__(self) -> Iterator[Entry]:
        """Yield entries. Raises ImageError for a tar that is damaged, truncated or of an unknown dialect."""
        for entry, _ in self._entries(sparse=False):
            yield entry

    def raw(self) -> Iterator[tuple[Entry, bytes]]:
        """Yield each entry with its header blocks as they came, to be copied rather than unpacked.

        Sparse files of the PAX form pass: their `data` is what is stored. Raises ImageError.
        """
        yield from self._entries(sparse=True)

    def _entries(self, *, sparse: bool) -> Iterator[tuple[Entry, bytes]]:
        pax: dict[str, str] = {}
        head = b""
        for _ in range(MAX_ENTRIES):
            block = self._take(BLOCK)
            if block == END[:BLOCK]:
                if pax:
                    raise ImageError("tar ends after an extended header")
                # two zero blocks end an archive; whatever follows is only padding
                for _ in self._chunks:
                    pass
                return
            kind, size = _parse(block), _number(block[124:136], "size")
            if kind in (b"x", b"L", b"K"):
                head += block + self._meta(kind, size, pax)
                if len(head) > MAX_HEAD:
                    raise ImageError("tar entry has too many extended headers")
                continue
            if kind == b"g":
                self._discard(size)
                continue
            if not sparse or kind == b"S":
                _refuse_sparse(kind, pax)
            entry = _entry(block, kind, size, pax)
            self._left, self.head = entry.size, head + block
            yield entry, self.head
            pax, head = {}, b""
            if self._left:
                raise ImageError(f"tar entry {entry.name[:200]!r} was not read to its end")
            self._take(-entry.size % BLOCK)
        raise ImageError(f"tar has over {MAX_ENTRIES} headers")

    def data(self) -> Iterator[memoryview]:
        """The current entry's bytes, as views that are valid until the next step."""
        while self._left:
            if not len(self._view):
                self._fill()
            piece = self._view[: self._left]
            self._view = self._view[len(piece) :]
            self._left -= len(piece)
            yield piece

    def _meta(self, kind: bytes, size: int, pax: dict[str, str]) -> bytes:
        if size > MAX_META:
            raise ImageError(f"tar extended header is {size} bytes; at most {MAX_META} are accepted")
        raw = self._take(size)
        rest = self._take(-size % BLOCK)
        if kind == b"x":
            pax.update(_records(raw))
        else:
            pax["path" if kind == b"L" else "linkpath"] = _text(raw.rstrip(b"\0"))
        return raw + rest

    def _discard(self, size: int) -> None:
        if size > MAX_META:
            raise ImageError(f"tar global header is {size} bytes; at most {MAX_META} are accepted")
        self._take(size + -size % BLOCK)

    def _take(self, n: int) -> bytes:
        parts = []
        while n:
            if not len(self._view):
                self._fill()
            piece = self._view[:n]
            self._view = self._view[len(piece) :]
            n -= len(piece)
            parts.append(bytes(piece))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self) -> None:
        for chunk in self._chunks:
            if len(chunk):
                self._view = memoryview(chunk)
                return
        raise ImageError("tar ends in the middle: it is truncated")


def _parse(block: bytes) -> bytes:
    stored = _number(block[148:156], "checksum")
    if stored != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise ImageError("tar header has a wrong checksum: this is not a tar, or it is damaged")
    return block[156:157]


def _refuse_sparse(kind: bytes, pax: dict[str, str]) -> None:
    if any(key.startswith("GNU.sparse") for key in pax) or kind == b"S":
        raise ImageError("tar holds a sparse file", hint="pack it without tar's --sparse")


def _entry(block: bytes, kind: bytes, size: int, pax: dict[str, str]) -> Entry:
    name = _text(block[:100].split(b"\0", 1)[0])
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = f"{_text(prefix)}/{name}"
    if "size" in pax:
        if not pax["size"].isascii() or not pax["size"].isdigit() or len(pax["size"]) > 18:
            raise ImageError("tar PAX header has a bad size")
        size = int(pax["size"])
    if kind in (b"\0", b"7"):
        kind = FILE
    if size and kind in (*_KINDS, DIRECTORY):
        raise ImageError("tar entry that is no file has a size")
    return Entry(
        pax.get("path", name), kind, size, pax.get("linkpath", _text(block[157:257].split(b"\0", 1)[0]))
    )


def _number(field: bytes, what: str) -> int:
    if field[:1] == b"\x80":  # GNU base-256
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0")
        if not all(c in b"01234567" for c in digits):
            raise ImageError(f"tar header has a bad {what}")
        value = int(digits or b"0", 8)
    if value > 1 << 50:
        raise ImageError(f"tar header has an absurd {what}: {value}")
    return value


def _records(raw: bytes) -> dict[str, str]:
    result = {}
    while raw:
        length, blank, _ = raw.partition(b" ")
        if not blank or not length.isdigit() or len(length) > 6:
            raise ImageError("tar PAX header is malformed")
        end = int(length)
        record = raw[len(length) + 1 : end]
        if not len(length) + 1 < end <= len(raw) or record[-1:] != b"\n" or b"=" not in record:
            raise ImageError("tar PAX header is malformed")
        key, _, value = record[:-1].partition(b"=")
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse"):
            result[_text(key)] = _text(value)
        raw = raw[end:]
    return result


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise ImageError(f"tar holds a name that is not UTF-8: {raw[:100]!r}") from e
