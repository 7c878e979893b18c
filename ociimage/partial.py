# SPDX-License-Identifier: Apache-2.0
"""The directory that a pull fills before it has its name, and what a pull that was killed had filled of it.

    .NAME.partial/files/     the checkpoint as far as it goes; becomes NAME
    .NAME.partial/journal    lines of JSON: {"image": DIGEST}, then of layer number L
        {"layer": L, "name": NAME, "size": N, "head": BASE64}  a member of its tar, from its header on
        {"layer": L, "raw": R, "blob": B}  the first R bytes of the tar are in files and journal; byte B of the blob
                                           begins what follows
        {"layer": L, "whole": R}           all R bytes of it are
        {"layer": L, "anew": 0}            forget what came before

The journal is not believed: it only says how to put the start of a tar together from the files, and what comes of
that is hashed again with the rest (incoming.py). A pull that fails leaves nothing; only one that was killed does.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import secrets
import shutil
import stat
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryoci import files
from cryoci.errors import ConflictError, ImageError, PrivilegeError, UsageError
from cryoci.ociimage import archive, blob, strictjson, tar

STEP = 4 << 20  # bytes of tar between two lines of how far it is
MAX_LINE = 2 * tar.MAX_HEAD  # bytes
MAX_JOURNAL = 64 << 20  # bytes
MAX_END = 1 << 20  # bytes of zeros behind a tar's last member
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Member:
    """A member of a tar as its header came; `name` is empty for what is no file."""

    name: str
    size: int
    head: bytes


@dataclass
class Layer:
    """The start of a layer's tar: its first `raw` bytes, which end where byte `blob` of the blob begins a frame."""

    members: list[Member] = field(default_factory=list)
    raw: int = 0
    blob: int = 0
    whole: bool = False

    def present(self) -> dict[str, int]:
        """The files that have bytes in it, and how many."""
        return {m.name: have for m, start in self._placed() if m.name and (have := self._have(m, start))}

    def content(self, directory: Path) -> Iterator[bytes]:
        """These bytes, read from the files in `directory`. Raises ImageError."""
        done = 0
        for member, start in self._placed():
            yield member.head[: max(0, self.raw - done)]
            if have := self._have(member, start):
                yield from _read(directory, member.name, have)
            done = start + member.size + -member.size % tar.BLOCK
            yield tar.padding(member.size)[: max(0, self.raw - start - member.size)]
        while done < self.raw:
            yield bytes(min(blob.CHUNK, self.raw - done))
            done += min(blob.CHUNK, self.raw - done)

    def _have(self, member: Member, start: int) -> int:
        return max(0, min(member.size, self.raw - start))

    def _placed(self) -> Iterator[tuple[Member, int]]:
        """Each member with the place of its data."""
        done = 0
        for member in self.members:
            yield member, done + len(member.head)
            done += len(member.head) + member.size + -member.size % tar.BLOCK


class Partial:
    """A directory being filled: `files`; with an account of it when it was opened for an `image` to be taken up."""

    def __init__(self, place: Path, image: str = "") -> None:
        self.place = place
        self.files = place / "files"
        self._journal = place / "journal"
        self._lock = threading.Lock()
        self._fd = -1
        self._kept = _load(self._journal, image) if image else {}
        self._clear()
        if image:
            lines = [_line({"image": image})]
            for number, layer in self._kept.items():
                lines += [_noted(number, member) for member in layer.members]
                how = {"whole": layer.raw} if layer.whole else {"raw": layer.raw, "blob": layer.blob}
                lines.append(_line({"layer": number, **how}))
            files.write_atomic(self._journal, b"".join(lines))
            self._fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def kept(self, number: int) -> Layer | None:
        """What there is of a layer from before."""
        return self._kept.get(number)

    def member(self, number: int, member: Member) -> None:
        """Note a member whose data is to come."""
        self._write(_noted(number, member))

    def reached(self, number: int, raw: int, place: int) -> None:
        """Note that the first `raw` bytes of a layer's tar, up to byte `place` of the blob, are written."""
        self._write(_line({"layer": number, "raw": raw, "blob": place}))

    def whole(self, number: int, raw: int) -> None:
        """Note a layer of which all is written, and was what it should be."""
        self._write(_line({"layer": number, "whole": raw}))

    def anew(self, number: int) -> None:
        """Note that what there was of a layer is gone."""
        self._kept.pop(number, None)
        self._write(_line({"layer": number, "anew": 0}))

    def close(self) -> None:
        """Write no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._fd >= 0:
                os.write(self._fd, line)

    def _clear(self) -> None:
        """Keep what `_kept` names, and nothing else."""
        wanted = {name for layer in self._kept.values() for name in layer.present()}
        for entry in os.scandir(self.place):
            if entry.is_dir(follow_symlinks=False) and entry.name == "files":
                continue
            if entry.name != "journal":
                _remove(entry)
        self.files.mkdir(mode=0o700, exist_ok=True)
        for entry in os.scandir(self.files):
            if entry.is_dir(follow_symlinks=False) and entry.name in archive.FOLDERS:
                for inner in os.scandir(entry.path):
                    if f"{entry.name}/{inner.name}" not in wanted:
                        _remove(inner)
            elif entry.name not in wanted:
                _remove(entry)


@contextmanager
def opened(directory: Path, image: str = "") -> Iterator[Partial]:
    """A private sibling directory whose `files` become `directory` when the block ends well, else vanish.

    With `image`, the digest of a manifest, what a killed pull of the same image to there had is kept. Raises
    ConflictError when `directory` holds something, or another pull is about to make it.
    """
    if directory.is_symlink() or (
        directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise ConflictError(
            f"{directory} exists and is not an empty directory", hint="name another, or remove it"
        )
    if directory.name in ("", ".."):
        raise UsageError(f"{directory} cannot be made", hint="name the directory to make")
    place = directory.parent / f".{directory.name}.partial"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        fd = _own(place)
        if fd is None:  # somebody else's: theirs to remove
            image = ""
            place = directory.parent / f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
            fd = _own(place)
            assert fd is not None
    except PermissionError as e:
        raise PrivilegeError(
            f"cannot write in {directory.parent}", hint="run as root, or name another place"
        ) from e
    try:
        _take(fd, place, directory)
        try:
            partial = Partial(place, image)
            try:
                yield partial
            finally:
                partial.close()
            os.rename(partial.files, directory)
            if not files.passing(directory):  # the file system would write out all of it first
                files.sync_directory(directory.parent)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(fd)


def _own(place: Path) -> int | None:
    """The directory `place`, made if need be; None when it is not ours alone."""
    try:
        place.mkdir(mode=0o700)
    except FileExistsError:
        pass
    try:
        fd = os.open(place, _DIR)
    except NotADirectoryError:
        return None
    except OSError:
        if place.is_symlink():
            return None
        raise
    found = os.fstat(fd)
    if found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077:
        return fd
    os.close(fd)
    return None


def _take(fd: int, place: Path, directory: Path) -> None:
    """Lock `place`, and see that it is what has the name still. Raises ConflictError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.stat(place, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        there = None
    if there is None or there.st_ino != os.fstat(fd).st_ino:
        raise ConflictError(f"another pull to {directory} is under way", hint="let it end, or end it")


def _load(journal: Path, image: str) -> dict[int, Layer]:
    """What a journal of `image` tells, up to the first line that makes no sense."""
    layers: dict[int, Layer] = defaultdict(Layer)
    marks: dict[int, list[tuple[int, int]]] = defaultdict(list)
    try:
        data = archive.read(journal, MAX_JOURNAL)
        first, *lines = data.split(b"\n")
        if strictjson.load_object(first, "journal", limit=MAX_LINE).get("image") != image:
            return {}
    except (ImageError, OSError):
        return {}
    for line in lines:
        try:
            value = strictjson.load_object(line, "journal", limit=MAX_LINE)
            number = int(value["layer"])
            if "anew" in value:
                layers.pop(number, None)
                marks.pop(number, None)
            elif "whole" in value:
                layers[number].raw, layers[number].whole = _count(value["whole"]), True
            elif "raw" in value:
                marks[number].append((_count(value["raw"]), _count(value["blob"])))
            else:
                layers[number].members.append(_member(value))
        except (ImageError, KeyError, ValueError, TypeError):
            break  # the line that a kill cut off
    for number, layer in layers.items():
        _settle(layer, marks[number])
    names = [name for layer in layers.values() for name in layer.present()]
    if len(names) != len(set(names)):
        return {}
    return {number: layer for number, layer in layers.items() if layer.raw}


def _settle(layer: Layer, marks: list[tuple[int, int]]) -> None:
    """Let a layer end at the last mark up to which its members are known, and forget those behind it."""
    extent = sum(len(m.head) + m.size + -m.size % tar.BLOCK for m in layer.members)
    if layer.whole and not 0 <= layer.raw - extent <= MAX_END:
        layer.raw, layer.whole = 0, False
    elif not layer.whole:
        layer.raw, layer.blob = max((mark for mark in marks if mark[0] <= extent), default=(0, 0))
    before, kept = 0, []
    for member in layer.members:
        if before < layer.raw:
            kept.append(member)
        before += len(member.head) + member.size + -member.size % tar.BLOCK
    layer.members = kept


def _member(value: Mapping[str, object]) -> Member:
    name, size = str(value["name"]), _count(value["size"])
    if (name and not archive.allowed(name)) or (size and not name):
        raise ValueError(name)
    try:
        head = base64.b64decode(str(value["head"]), validate=True)
    except binascii.Error as e:
        raise ValueError from e
    return Member(name, size, head)


def _noted(number: int, member: Member) -> bytes:
    head = base64.b64encode(member.head).decode()
    return _line({"layer": number, "name": member.name, "size": member.size, "head": head})


def _line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _read(directory: Path, name: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file, in which what would be a hole at its end may be missing."""
    folder, _, base = name.rpartition("/")
    try:
        at = os.open(directory / folder, _DIR)
        try:
            fd = os.open(base, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
        finally:
            os.close(at)
        with open(fd, "rb", buffering=0) as file:
            while size:
                chunk = file.read(min(size, blob.CHUNK)) or bytes(min(size, blob.CHUNK))
                size -= len(chunk)
                yield chunk
    except OSError as e:
        raise ImageError(f"what there was of {name} cannot be read: {e.strerror}") from e


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path)
    else:
        os.unlink(entry.path)
