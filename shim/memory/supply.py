# SPDX-License-Identifier: Apache-2.0
"""Memory that lies in no directory of this node: what stores it, and what brings it back, are the caller's.

`cryoci checkpoint --straight` has the chunks stored in a registry or layout before they are dropped. The runtime and
this room know of that only what stands here; ociimage has the rest (uses/straight.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cryoci.errors import CryociError, RestoreError
from cryoci.shim.memory import chunk, index


class Supply(Protocol):
    """Chunk files and index of one checkpoint, wherever they are.

    `size` and `largest` are bytes of all chunk files and of the largest. `stays`: they are used for something else
    afterwards, so nobody is to forget them. `budget`: bytes of memory for those on their way, where one was given.
    """

    size: int
    largest: int
    stays: bool
    budget: int | None

    def index(self) -> bytes:
        """The content of cryoci-memory.json. Raises CryociError."""

    def fetch(self, name: str, fd: int) -> None:
        """Write the chunk file `name` to the empty file `fd`. Raises CryociError, OSError."""

    def forget(self) -> None:
        """Nobody needs them any more. Never raises."""


Supplier = Callable[[str], Supply]  # by what a journal has as `source`; raises CryociError


class Storing(Protocol):
    """What stores chunks while they are captured: `path` is its socket (sink.py), `error` why it failed."""

    path: str
    error: CryociError | None


def supplied(source: str, supplier: Supplier | None, container: str) -> Supply:
    """What the memory of `container` comes back from. Raises RestoreError that says where it is."""
    if supplier is None:
        raise RestoreError(
            f"the memory of container {container} is in {source}", hint=f"run `cryoci repair {container}`"
        )
    with reaching(source, container):
        return supplier(source)


@contextmanager
def reaching(source: str, container: str) -> Iterator[None]:
    """A with block that reads from `source`: raises RestoreError that says what waits for it."""
    try:
        yield
    except CryociError as e:
        raise RestoreError(
            f"the memory of container {container} is in {source}, which cannot be read: {e.message}",
            hint=f"its processes are stopped and wait for it; when it can be reached: cryoci repair {container}",
        ) from e


def read_index(supply: Supply) -> index.Index:
    """Its index, checked. Raises ImageError, UnsupportedError..."""
    return index.parse(supply.index())


def opened(supply: Supply, key: chunk.Key, digest: str, fd: int | None = None) -> chunk.Reader:
    """The chunk `key`, fetched into the empty file `fd`, else into memory of its own. Closes that.

    Raises ImageError, IntegrityError, RegistryError...
    """
    if fd is None:
        fd = os.memfd_create(key.name, os.MFD_CLOEXEC)
    try:
        supply.fetch(key.name, fd)
    except BaseException:
        os.close(fd)
        raise
    return chunk.Reader(-1, key, digest, fd)


def bring(supply: Supply, directory: str) -> None:
    """Write all chunk files into `directory`, whose index names them. Raises ImageError, OSError..."""
    where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for key, digest in index.read(directory).chunks:
            new = f".{key.name}.new"
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=where)
            try:
                with opened(supply, key, digest, fd) as reader:
                    os.fsync(fd)
                    reader.check()
            except BaseException:
                os.unlink(new, dir_fd=where)
                raise
            os.rename(new, key.name, src_dir_fd=where, dst_dir_fd=where)
        os.fsync(where)
    finally:
        os.close(where)
