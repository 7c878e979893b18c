# SPDX-License-Identifier: Apache-2.0
"""Images for CRIU alone: chunk files go into pages-*.img and pagemap-*.img, and the guard comes off.

    pagemap-PID.img ::= COMMON_MAGIC PAGEMAP_MAGIC { SIZE MESSAGE }   head {1: pages_id}, then entries in order
                                                                     {1: vaddr  2 or 5: pages  4: flags}
    core-PID.img    ::= COMMON_MAGIC CORE_MAGIC SIZE MESSAGE          {... 3: tc {1: task_state ...} ...}

New files are written beside the old ones and renamed when all are there, the guard last, so that a run that
was cut off can be repeated.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryoci import protobuf
from cryoci.errors import ImageError
from cryoci.files import sync_directory
from cryoci.shim.criu import images
from cryoci.shim.memory import capture, chain, chunk, fill, guard, index
from cryoci.shim.memory.calls import PAGE, Run

_PRESENT = 4  # PE_PRESENT
_PARENT = 1  # PE_PARENT
_ALIVE, _STOPPED = 1, 3  # TASK_ALIVE, TASK_STOPPED (criu/include/pid.h)
_NEW = ".cryoci-new"
_PIECE = 64 << 20


def size(directory: str | os.PathLike[str]) -> int:
    """Bytes that `materialize` would move. Raises what it raises."""
    where = chain.images_of(directory)
    return fill.size(index.read(where), where)


def materialize(directory: str | os.PathLike[str], passed: Callable[[int], None] = lambda n: None) -> int:
    """Make the images in `directory` (or its checkpoint/) whole; returns the bytes that moved.

    `passed` is told of bytes as they move. Raises NotFoundError when they are whole already or no images, ImageError,
    IntegrityError, OSError: the directory then is as it was, less some room.
    """
    where = chain.images_of(directory)
    content = index.read(where)
    if os.path.exists(f"{where}/{guard.FILES_KEPT}"):
        guard.arm(where)
    places = chain.Places(content, where)
    moved = 0
    renames: list[str] = []
    try:
        for vpid in content.areas:
            chunks = [(key, digest) for key, digest in content.chunks if key.vpid == vpid]
            done, name = _pages(where, places, vpid, chunks, passed)
            moved += done
            renames += [f"pagemap-{vpid}.img", name, f"core-{vpid}.img"]
            _write(f"{where}/core-{vpid}.img{_NEW}", _awake(_read(f"{where}/core-{vpid}.img")))
        sync_directory(where)
    except BaseException:
        for path in Path(where).glob(f"*{_NEW}"):
            path.unlink()
        raise
    finally:
        places.close()
    for name in renames:
        os.rename(f"{where}/{name}{_NEW}", f"{where}/{name}")
    sync_directory(where)
    os.unlink(f"{where}/{index.NAME}")
    guard.disarm(where)
    capture.remove(where)
    return moved


@dataclass(frozen=True)
class _Entry:
    """An entry of a pagemap; `at` is where its pages lie in the pages file, if they do."""

    start: int
    pages: int
    flags: int
    at: int = 0

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE


def _pages(
    where: str,
    places: chain.Places,
    vpid: int,
    chunks: list[tuple[chunk.Key, str]],
    passed: Callable[[int], None],
) -> tuple[int, str]:
    """Write a process' pages anew, CRIU's and the chunks' in the order of their addresses.

    CRIU has pages of areas that were dropped, too: the kernel has written to a thread's rseq area since. There the
    chunk's count, as they do in a restore.
    """
    data = _read(f"{where}/pagemap-{vpid}.img")
    messages = list(images.messages(data))
    name = f"pages-{_number(messages[0], 1)}.img"
    wide = any(5 in _values(message) for message in messages[1:])
    stored: list[Run] = []
    for key, digest in chunks:
        with chunk.Reader(places.of(key), key, digest) as reader:
            stored += reader.runs
    old = deque(_outside(_entries(messages[1:], vpid), stored))
    found = [data[:8], _sized(messages[0])]
    moved = 0
    buffer = chunk.Buffer()
    with open(f"{where}/{name}{_NEW}", "wb") as out, open(f"{where}/{name}", "rb") as before:

        def take(limit: int) -> None:
            while old and old[0].start < limit:
                entry = old.popleft()
                found.append(_new_entry(entry.start, entry.pages, entry.flags, wide=wide))
                if entry.flags & _PRESENT:
                    _copy(before, out, entry.at, entry.pages * PAGE)

        for part in chunks:
            with chunk.Reader(places.of(part[0]), *part) as reader:
                for runs, size in reader.pieces(buffer):
                    at = 0
                    for first, length in runs:
                        take(first)
                        found.append(_new_entry(first, length // PAGE, _PRESENT, wide=wide))
                        out.write(buffer.view[at : at + length])
                        at += length
                    moved += size
                    passed(size)
        take(1 << 64)
        out.flush()
        os.fsync(out.fileno())
    _write(f"{where}/pagemap-{vpid}.img{_NEW}", b"".join(found))
    return moved, name


def _entries(messages: list[bytes], vpid: int) -> Iterator[_Entry]:
    """The entries of a pagemap in order. Raises ImageError when they overlap."""
    at = last = 0
    for message in messages:
        values = _values(message)
        flags = values.get(4, _PARENT if values.get(3) else _PRESENT)
        entry = _Entry(values.get(1, 0), values.get(5) or values.get(2, 0), flags, at)
        if entry.start < last:
            raise ImageError(f"page {entry.start:x} of process {vpid} is in the checkpoint twice")
        last = entry.end
        at += entry.pages * PAGE if flags & _PRESENT else 0
        yield entry


def _outside(entries: Iterable[_Entry], runs: Sequence[Run]) -> Iterator[_Entry]:
    """What of the entries lies outside of `runs`; both are in order."""
    number = 0
    for entry in entries:
        start = entry.start
        while number < len(runs) and sum(runs[number]) <= start:
            number += 1
        inside = number
        while start < entry.end:
            first, size = runs[inside] if inside < len(runs) else (entry.end, 0)
            if start < first:
                pages = (min(first, entry.end) - start) // PAGE
                yield _Entry(start, pages, entry.flags, entry.at + start - entry.start)
            start = max(start, min(first, entry.end), first + size)
            inside += 1


def _copy(old: BinaryIO, out: BinaryIO, at: int, size: int) -> None:
    out.flush()
    done = 0
    while done < size:
        count = os.sendfile(out.fileno(), old.fileno(), at + done, min(size - done, _PIECE))
        if count == 0:
            raise ImageError(f"{os.path.basename(old.name)} of the checkpoint is cut off")
        done += count


def _awake(data: bytes) -> bytes:
    """A core image whose process runs when it is restored: it was stopped for its memory only."""
    at = 12  # past two magics and the size
    for number, value, _ in protobuf.spans(data[at:]):
        if number == 3 and isinstance(value, tuple):
            for inner, state, place in protobuf.spans(data[at + value[0] : at + value[1]]):
                if inner == 1 and state == _STOPPED:
                    place += at + value[0]
                    return data[:place] + bytes([_ALIVE]) + data[place + 1 :]
                if inner == 1 and state == _ALIVE:
                    return data  # an earlier run was cut off
    raise ImageError("a process whose memory is out of band was not stopped in the checkpoint")


def _values(message: bytes) -> dict[int, int]:
    return {number: value for number, value, _ in protobuf.spans(message) if isinstance(value, int)}


def _number(message: bytes, wanted: int) -> int:
    for number, value, _ in protobuf.spans(message):
        if number == wanted and isinstance(value, int):
            return value
    raise ImageError("a pagemap of the checkpoint names no pages")


def _new_entry(start: int, pages: int, flags: int, *, wide: bool) -> bytes:
    """Older CRIUs count pages in field 2, newer ones in 5, and others' tools know field 2 alone: both have it."""
    counts = ((2, min(pages, 2**32 - 1)), (4, flags), *(((5, pages),) if wide else ()))
    return _sized(b"".join(protobuf.number_field(number, value) for number, value in ((1, start), *counts)))


def _sized(message: bytes) -> bytes:
    return len(message).to_bytes(4, "little") + message


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as f:
        return f.read()


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
