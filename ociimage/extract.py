# SPDX-License-Identifier: Apache-2.0
"""Extraction of an untrusted tar into a checkpoint directory.

Only names of `archive.allowed` are created, only as regular files, each once, through directory descriptors
with O_EXCL and O_NOFOLLOW: no path is ever resolved through something that the archive made. The one
symbolic link that podman writes (checkpoint/parent) is not taken from the archive but made anew.

A tar of up to 8 MiB (every metadata layer) also passes tarsafe first. tarsafe 0.0.6 refuses names and links
that leave the root lexically, and devices. It does not catch links that lead out through other links, links
that lie in the destination already, FIFOs, set-id bits, or bombs; and it needs the whole archive, so larger
ones do not pass it. None of this matters to the rules above, which hold for every archive.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from cryoci.errors import ImageError, SpaceError
from cryoci.ociimage import archive, tar

SMALL = 8 << 20  # bytes of tar that are looked at as a whole
HOLE = 128 << 10  # bytes; aligned runs of zeros of this length become holes
_ZEROS = bytes(HOLE)
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Account(Protocol):
    """Hears of a tar as it is unpacked; some of it may be on the disk already."""

    def present(self) -> Mapping[str, int]:
        """The files that are there, and how many of their first bytes."""

    def member(self, name: str, size: int, head: bytes) -> None:
        """A member whose data is to come: its header blocks, and for a file its name."""

    def written(self, size: int) -> None:
        """So many bytes more of the tar are done with."""


class Extractor:
    """Unpacks the layers of one image, or one archive, into `directory`, which must exist and be empty.

    A file name may come once over all layers. Several threads may call `extract`, a layer each. With `keep`
    only files whose name it accepts are written, at most `most` bytes of them; the others are checked all the
    same. `sizes` has the bytes of every file that came.
    """

    def __init__(
        self, directory: Path, keep: Callable[[str], bool] | None = None, most: int = sys.maxsize
    ) -> None:
        self.sizes: dict[str, int] = {}
        self._left = most
        self._keep = keep
        self._root = os.open(directory, _DIR_FLAGS)
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._folders: dict[str, int] = {}

    def __enter__(self) -> Extractor:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._folders.values():
            os.close(fd)
        os.close(self._root)

    def extract(self, chunks: Iterable[bytes], *, folder: str = "", account: Account | None = None) -> int:
        """Unpack one tar; returns the bytes of its files. Raises ImageError; SpaceError on a full disk.

        With `folder` all that it holds lies flat, and belongs into that folder (containerd's CRIU layer). What the
        `account` says to be present is left as it is, and removed with the others of this tar on an ImageError.
        """
        total = 0
        checked = _checked(chunks)
        reader = tar.Reader(checked if account is None else _followed(checked, account))
        present = dict(account.present()) if account is not None else {}
        taken: list[str] = []
        try:
            for entry in reader:
                total += self._member(entry, reader, folder, account, present, taken)
            if strange := present.keys() - set(taken):
                raise ImageError(f"{min(strange)} is there already, and not in this tar")
        except ImageError:
            if present:
                self._forget({*taken, *(present.keys() - self._seen)})
            raise
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpaceError(
                    f"no space left for the checkpoint: {e.strerror}", hint="free some space"
                ) from e
            raise
        return total

    def _member(
        self,
        entry: tar.Entry,
        reader: tar.Reader,
        within: str,
        account: Account | None,
        present: Mapping[str, int],
        taken: list[str],
    ) -> int:
        name = _normal(entry.name)
        if account is not None:
            account.member(name if entry.kind == tar.FILE else "", entry.size, reader.head)
        if within and name.rstrip("/") not in ("", "."):
            name = f"{within}/{name}"
        if entry.kind == tar.DIRECTORY:
            name = name.rstrip("/")
            if name not in ("", ".", *archive.FOLDERS):
                raise archive.unknown(entry.name)
            if name in archive.FOLDERS:
                self._folder(name)
            return 0
        if entry.kind == tar.SYMLINK and name == archive.PARENT:
            if entry.link.rstrip("/") != archive.PARENT_TARGET:
                raise ImageError(f"the image holds a link {archive.PARENT} to {entry.link[:200]!r}")
            self._once(name)
            taken.append(name)
            os.symlink(archive.PARENT_TARGET, "parent", dir_fd=self._folder("checkpoint"))
            return 0
        if entry.kind != tar.FILE:
            raise ImageError(
                f"the image holds a {entry.kind_name}, {entry.name[:200]!r}: only files are accepted"
            )
        if not archive.allowed(name):
            raise archive.unknown(entry.name)
        self._once(name)
        taken.append(name)
        self.sizes[name] = entry.size
        if self._keep is not None and not self._keep(name):
            for _ in reader.data():
                pass
            return 0
        self._left -= entry.size
        if self._left < 0:
            raise ImageError(
                f"the checkpoint's descriptions are too large: {name} is {entry.size} bytes more"
            )
        folder, slash, base = name.rpartition("/")
        at = self._folder(folder) if slash else self._root
        have = present.get(name, 0)
        fd = _reopen(base, have, at) if have else _create(base, at)
        try:
            _write(fd, _after(reader.data(), have), entry.size, have)
        finally:
            os.close(fd)
        return entry.size

    def _forget(self, names: Iterable[str]) -> None:
        """Remove files that were made, so that they may come again."""
        for name in names:
            folder, slash, base = name.rpartition("/")
            try:
                os.unlink(base, dir_fd=self._folder(folder) if slash else self._root)
            except FileNotFoundError:
                pass
            with self._lock:
                self._seen.discard(name)
                self.sizes.pop(name, None)

    def _once(self, name: str) -> None:
        with self._lock:
            if name in self._seen:
                raise ImageError(f"the image holds {name!r} twice")
            if len(self._seen) >= archive.MAX_FILES:
                raise ImageError(f"the image holds over {archive.MAX_FILES} files")
            self._seen.add(name)

    def _folder(self, name: str) -> int:
        if name not in self._folders:
            try:
                os.mkdir(name, 0o700, dir_fd=self._root)
            except FileExistsError:
                pass  # another layer's thread was first
            fd = os.open(name, _DIR_FLAGS, dir_fd=self._root)
            if self._folders.setdefault(name, fd) != fd:
                os.close(fd)
        return self._folders[name]


def members(chunks: Iterable[bytes], wanted: Iterable[str], *, limit: int) -> dict[str, bytes]:
    """The content of the files `wanted` in a tar, each at most `limit` bytes, without touching the disk."""
    names, found = set(wanted), dict[str, bytes]()
    reader = tar.Reader(chunks)
    for entry in reader:
        name = _normal(entry.name)
        if entry.kind == tar.FILE and name in names and name not in found:
            if entry.size > limit:
                raise ImageError(f"{name} is {entry.size} bytes; at most {limit} are accepted")
            found[name] = b"".join(bytes(piece) for piece in reader.data())
        else:
            for _ in reader.data():
                pass
    return found


def _normal(name: str) -> str:
    # buildah and tar write ./name; nothing else is normalised, so nothing else can be hidden in a name
    return name.removeprefix("./")


def _create(base: str, at: int) -> int:
    try:
        return os.open(base, _FILE_FLAGS, 0o600, dir_fd=at)
    except FileExistsError as e:  # of a layer that is taken up, and has not come to it yet
        raise ImageError(f"the image holds {base!r} twice") from e


def _reopen(base: str, have: int, at: int) -> int:
    """A file that an earlier pull had begun, cut to the `have` bytes of it that count."""
    try:
        fd = os.open(base, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as e:
        raise ImageError(f"what there was of {base} is gone: {e.strerror}") from e
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise ImageError(f"what there was of {base} is no longer a file of its own")
    os.ftruncate(fd, have)
    return fd


def _after(pieces: Iterable[memoryview], count: int) -> Iterator[memoryview]:
    """`pieces` without their first `count` bytes."""
    for piece in pieces:
        skipped = min(count, len(piece))
        count -= skipped
        if skipped < len(piece):
            yield piece[skipped:]


def _followed(chunks: Iterable[bytes], account: Account) -> Iterator[bytes]:
    for chunk in chunks:
        yield chunk
        account.written(len(chunk))


def _write(fd: int, pieces: Iterable[memoryview], size: int, offset: int = 0) -> None:
    """Write a file of `size` bytes from `offset` on, leaving holes where whole blocks are zero."""
    for piece in pieces:
        start = 0
        while start < len(piece):
            # cut at multiples of HOLE in the file, whatever the pieces are
            end = min(len(piece), start + HOLE - (offset + start) % HOLE)
            if not _is_zero(piece[start:end]):
                run = end
                while run < len(piece) and piece[run] != 0:
                    run = min(len(piece), run + HOLE)
                _write_all(fd, piece[start:run], offset + start)
                end = run
            start = end
        offset += len(piece)
    os.ftruncate(fd, size)


def _is_zero(block: memoryview) -> bool:
    """Whether all of a block of at most HOLE bytes is zero; most blocks show it in their first bytes."""
    return not any(block[:16]) and bytes(block) == (_ZEROS if len(block) == HOLE else _ZEROS[: len(block)])


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def _checked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """`chunks`, after tarsafe's word when they are few enough."""
    source = iter(chunks)
    start: list[bytes] = []
    size = 0
    while size <= SMALL and (len(start) != 1 or not _is_large(start[0])):
        chunk = next(source, None)
        if chunk is None:
            _tarsafe(b"".join(start))
            break
        start.append(chunk)
        size += len(chunk)
    for i, chunk in enumerate(start):
        start[i] = b""
        yield chunk
    yield from source


def _is_large(start: bytes) -> bool:
    """Whether the members that begin in `start` alone are more than SMALL, so that none of the tar need be kept."""
    reader, size = tar.Reader([start]), 0
    try:
        for entry in reader:
            size += entry.size
            if size > SMALL:
                return True
            for _ in reader.data():
                pass
    except ImageError:
        pass  # cut off, as it is no more than a start; whoever reads all of it says what is wrong
    return False


def _tarsafe(data: bytes) -> None:
    from tarsafe import TarSafe, TarSafeException

    class Outer(TarSafe):  # type: ignore[misc]
        """tarsafe, without podman's link: it takes any link out of a folder for one out of the archive."""

        def __iter__(self) -> Iterator[tarfile.TarInfo]:
            for member in super().__iter__():
                if not (
                    member.issym()
                    and member.name == archive.PARENT
                    and member.linkname == archive.PARENT_TARGET
                ):
                    yield member

    # headers are bounded by our own reader before the library, which allocates what they claim, sees them
    reader = tar.Reader([data])
    for _ in reader:
        for _ in reader.data():
            pass
    try:
        with Outer.open(fileobj=io.BytesIO(data), mode="r:") as outer:
            check: Any = outer._safetar_check  # extractall's own first step
            check("/nonexistent/checkpoint")
    except TarSafeException as e:
        raise ImageError(f"the image is unsafe: {e}") from e
    except (tarfile.TarError, ValueError, OSError) as e:
        raise ImageError(f"the image's tar is damaged: {e}") from e
