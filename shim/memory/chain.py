# SPDX-License-Identifier: Apache-2.0
"""Checkpoint directories that lean on others: some of their chunk files lie in directories beside them.

    BASE/c1/checkpoint/cryoci-memory-1-7f00.img       all chunk files are its own
    BASE/c2/checkpoint/cryoci-memory.json             sources: ["c1"]; a chunk of source 0 is c1's file of its name

A source is a plain name beside the checkpoint (or beside the images, where these are no checkpoint's), never a path
or a link. The index names for every chunk the directory that has it, so a chain of any length is one step. What is
read is compared with the chunk's digest: whoever writes an index gets nothing that he does not know already.

`thin` makes such a directory of a whole one, `flatten` a whole one of such a directory; both can be repeated.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress

from cryoci.errors import ConflictError, ImageError, IntegrityError, NotFoundError
from cryoci.files import sync_directory
from cryoci.shim.memory import chunk, index
from cryoci.shim.memory.chunk import Key
from cryoci.shim.memory.index import Index

IMAGES = "checkpoint"  # CRIU's images in a checkpoint directory
_NEW = ".cryoci-new"
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Places:
    """The open directories that hold the chunks of `index`, which is that of the images in `directory`.

    Raises ImageError when one of them is not there. Close it, or use it as a context manager.
    """

    def __init__(self, content: Index, directory: str) -> None:
        self._sources = content.sources
        self._fds: dict[str, int] = {}
        try:
            self._own = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise ImageError(f"{directory} cannot be opened: {e.strerror}") from e
        try:
            for name in sorted(set(content.sources.values())):
                self._fds[name] = _open(directory, name)
        except BaseException:
            self.close()
            raise

    def of(self, key: Key) -> int:
        """The directory with the file of chunk `key`."""
        name = self._sources.get(key)
        return self._own if name is None else self._fds[name]

    def close(self) -> None:
        for fd in (self._own, *self._fds.values()):
            os.close(fd)

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def images_of(directory: str | os.PathLike[str]) -> str:
    """The images with memory out of band in `directory`, or in its checkpoint/. Raises NotFoundError."""
    where = os.fspath(directory)
    for place in (where, f"{where}/{IMAGES}"):
        if index.exists(place):
            return place
    raise NotFoundError(
        f"{where} holds no memory out of band",
        hint=f"give a checkpoint directory with {index.NAME}",
    )


def thin(directory: str, parent: str) -> int:
    """Take the chunk files that `parent` has as well out of `directory` and name it instead; returns their bytes.

    Both are directories of images. Raises ConflictError when they are not beside each other, ImageError, OSError.
    """
    name = sibling(directory, parent)
    mine, theirs = index.read(directory), index.read(parent)
    known = dict(theirs.chunks)
    sources = dict(mine.sources)
    saved = 0
    with Places(theirs, parent) as there, Places(mine, directory) as here:
        for key, digest in mine.chunks:
            if key in sources or not digest or known.get(key) != digest:
                continue
            try:
                with (
                    chunk.Reader(there.of(key), key, digest) as old,
                    chunk.Reader(here.of(key), key, digest) as new,
                ):
                    size = os.fstat(new.fd).st_size
                    if not os.path.samestat(os.fstat(old.fd), os.fstat(new.fd)):
                        old.check()
            except (ImageError, IntegrityError):
                continue  # the parent's is damaged: this one stays
            sources[key] = theirs.sources.get(key, name)
            saved += size
    if len(set(sources.values())) > index.MAX_SOURCES:
        raise ConflictError(
            f"{directory} would lean on over {index.MAX_SOURCES} directories", hint="leave out --thin once"
        )
    if saved:
        index.write(directory, mine.areas, mine.chunks, sources)
        for key in sources.keys() - mine.sources.keys():
            with suppress(FileNotFoundError):
                os.unlink(f"{directory}/{key.name}")
        sync_directory(directory)
    return saved


def flatten(directory: str, passed: Callable[[int], None] = lambda n: None) -> int:
    """Bring all chunk files into `directory`, linked where possible, else copied; returns their bytes.

    `passed` is told of them as they come. Raises ImageError when a source is missing or another one's, IntegrityError
    when a chunk is damaged, OSError: the directory leans on the others as before then.
    """
    content = index.read(directory)
    brought = 0
    with Places(content, directory) as places:
        for key, digest in content.chunks:
            if key not in content.sources:
                continue
            with chunk.Reader(places.of(key), key, digest) as reader:
                reader.check()
                size = os.fstat(reader.fd).st_size
                _bring(reader.fd, f"{directory}/{key.name}")
            brought += size
            passed(size)
    if content.sources:
        sync_directory(directory)
        index.write(directory, content.areas, content.chunks)
    return brought


def link(fd: int, name: str, where: int | None = None) -> bool:
    """Give the open file `fd` another name, in the directory `where`; False where that cannot be."""
    try:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=where, follow_symlinks=True)
    except OSError:
        return False
    return True


def _bring(fd: int, path: str) -> None:
    new = path + _NEW
    with suppress(FileNotFoundError):
        os.unlink(new)
    if not link(fd, new):
        with os.fdopen(os.dup(fd), "rb") as source, open(new, "xb") as target:
            source.seek(0)
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
    os.rename(new, path)


def _base(directory: str) -> tuple[str, str, str]:
    """Where the sources of images lie, the images' own name there, and the way from such a name to images."""
    real = os.path.realpath(directory)
    above, name = os.path.split(real)
    if name == IMAGES:
        base, own = os.path.split(above)
        return base, own, f"/{IMAGES}"
    return above, name, ""


def sibling(directory: str, parent: str) -> str:
    """The name of `parent` as a source of `directory`. Raises ConflictError."""
    mine, theirs = _base(directory), _base(parent)
    if (
        (mine[0], mine[2]) != (theirs[0], theirs[2])
        or mine[1] == theirs[1]
        or not index.is_source(theirs[1])
    ):
        raise ConflictError(
            f"{directory} cannot lean on {parent}: that is not a directory of a plain name beside it",
            hint="put both into one directory, or leave out --thin",
        )
    return theirs[1]


def _open(directory: str, name: str) -> int:
    base, _, rest = _base(directory)
    try:
        fd = os.open(f"{base}/{name}", _OPEN)
        if not rest:
            return fd
        try:
            return os.open(rest[1:], _OPEN, dir_fd=fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise ImageError(
            f"memory of the checkpoint lies in {base}/{name}{rest}, which cannot be opened: {e.strerror}",
            hint=f"bring {name} back beside it; `cryoci flatten` makes a checkpoint independent of others",
        ) from e
