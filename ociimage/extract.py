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
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cryoci.errors import ImageError, SpaceError
from cryoci.ociimage import archive, tar

SMALL = 8 << 20  # bytes of tar that are looked at as a whole
HOLE = 128 << 10  # bytes; aligned runs of zeros of this length become holes
_ZEROS = bytes(HOLE)
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


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

    def extract(self, chunks: Iterable[bytes], *, folder: str = "") -> int:
        """Unpack one tar; returns the bytes of its files. Raises ImageError; SpaceError on a full disk.

        With `folder` all that it holds lies flat, and belongs into that folder (containerd's CRIU layer).
        """
        total = 0
        reader = tar.Reader(_checked(chunks))
        try:
            for entry in reader:
                total += self._member(entry, reader, folder)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpaceError(
                    f"no space left for the checkpoint: {e.strerror}", hint="free some space"
                ) from e
            raise
        return total

    def _member(self, entry: tar.Entry, reader: tar.Reader, within: str) -> int:
        name = _normal(entry.name)
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
            os.symlink(archive.PARENT_TARGET, "parent", dir_fd=self._folder("checkpoint"))
            return 0
        if entry.kind != tar.FILE:
            raise ImageError(
                f"the image holds a {entry.kind_name}, {entry.name[:200]!r}: only files are accepted"
            )
        if not archive.allowed(name):
            raise archive.unknown(entry.name)
        self._once(name)
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
        fd = os.open(base, _FILE_FLAGS, 0o600, dir_fd=self._folder(folder) if slash else self._root)
        try:
            _write(fd, reader.data(), entry.size)
        finally:
            os.close(fd)
        return entry.size

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


def _write(fd: int, pieces: Iterable[memoryview], size: int) -> None:
    """Write a file of `size` bytes, leaving holes where whole blocks are zero."""
    offset = 0
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
    while size <= SMALL:
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
