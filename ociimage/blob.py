# SPDX-License-Identifier: Apache-2.0
"""Blobs: verified streams of bytes, and what a store of them offers to the rest."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from cryoci.errors import IntegrityError
from cryoci.ociimage.manifest import Descriptor, digest_of
from cryoci.ociimage.parallel import WIDTH

CHUNK = (2 << 20) // WIDTH  # bytes of one read: smaller ones, where more layers hold some at a time
HASHERS = 4  # threads: two transfers, each with a digest of what is in it


@dataclass(frozen=True)
class Stored:
    """A blob that a store now has: `sent` bytes were moved to get it there, 0 when it was there before."""

    digest: str
    size: int
    sent: int


@dataclass(frozen=True)
class Fetched:
    """A manifest or index as a store returned it; `digest` was computed from `data`."""

    data: bytes
    media_type: str
    digest: str


class Source(Protocol):
    """Bytes that can be read again from the start, which is how a broken transfer goes on.

    `name` is what a later push of the same calls it by; empty when there can be no such push. `size` is how many there
    will be, None when that is not known before.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def open(self) -> Iterator[bytes]:
        """The bytes, in chunks."""

    def open_at(self, start: int) -> Iterator[bytes] | None:
        """The bytes from `start` on; None when they can only be had from the first."""


class Bytes:
    """A small Source."""

    name = ""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def open(self) -> Iterator[bytes]:
        """The bytes, at once."""
        yield self._data

    def open_at(self, start: int) -> Iterator[bytes]:
        """The rest of them."""
        yield self._data[start:]


@dataclass(frozen=True)
class Opened:
    """A Source made of a function, or of two when it can be read from any byte on."""

    opener: Callable[[], Iterator[bytes]]
    name: str = ""
    seeker: Callable[[int], Iterator[bytes]] | None = None
    size: int | None = None

    def open(self) -> Iterator[bytes]:
        """What the function returns."""
        return self.opener()

    def open_at(self, start: int) -> Iterator[bytes] | None:
        """What the other returns."""
        return self.seeker(start) if self.seeker is not None else None


class Store(Protocol):
    """A place of images: an OCI layout or a repository of a registry."""

    def session(self) -> AbstractContextManager[None]:
        """Held while an image is written; what a failure leaves behind is removed where that is possible."""

    def has_blob(self, digest: str, size: int) -> bool:
        """Whether the blob is there, with that size."""

    def put_blob(
        self, source: Source, expected: Descriptor | None, advance: Callable[[int], None]
    ) -> Stored:
        """Store a blob. With `expected`, skip one that is there and raise IntegrityError on other bytes."""

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes; raises IntegrityError, at the latest at their end, when they are others."""

    def raw_blob(self, descriptor: Descriptor, start: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `start` on as they are, for whoever checks them himself."""

    def get_manifest(self, reference: str) -> Fetched:
        """A manifest or index by tag or digest. Raises NotFoundError."""

    def put_manifest(self, data: bytes, media_type: str, name: str | None) -> str:
        """Store a manifest or index, under `name` if given; returns its digest."""

    def names(self) -> list[str]:
        """All tags, sorted."""

    def referrers(self, digest: str) -> list[Descriptor] | None:
        """What refers to `digest` by the store's own account; None when it keeps none."""


def verified(chunks: Iterable[bytes], descriptor: Descriptor) -> Iterator[bytes]:
    """`chunks`, followed by IntegrityError unless they had the descriptor's size and digest."""
    digest, size = Digest(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > descriptor.size:
            break
        digest.update(chunk)
        yield chunk
    check(digest.result(), size, descriptor)


class Digest:
    """sha256 beside other work: `update` waits for the piece before, and leaves its own to another thread."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pending: Future[None] | None = None

    def update(self, data: bytes | memoryview) -> Future[None]:
        """Add `data`, which must not change until the future that is returned is done."""
        self._wait()
        self._pending = _hashers().submit(self._hash.update, data)
        return self._pending

    def result(self) -> str:
        """`sha256:<hex>` of all that was added."""
        self._wait()
        return f"sha256:{self._hash.hexdigest()}"

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


@functools.cache
def _hashers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(HASHERS, "cryoci-sha256")


def check(digest: str, size: int, descriptor: Descriptor) -> None:
    """Raise IntegrityError unless digest and size are the descriptor's."""
    if size != descriptor.size:
        more = "more than " if size > descriptor.size else f"{size} of "
        raise IntegrityError(
            f"blob {descriptor.digest} has {more}the {descriptor.size} bytes that were promised",
            hint="it was altered or truncated where it is stored; push the checkpoint again",
        )
    if digest != descriptor.digest:
        raise IntegrityError(
            f"blob {descriptor.digest} has other bytes: their digest is {digest}",
            hint="it was altered where it is stored or on its way; do not restore it",
        )


def read_small(store: Store, descriptor: Descriptor, limit: int) -> bytes:
    """A whole blob of at most `limit` bytes, verified."""
    if descriptor.size > limit:
        raise IntegrityError(
            f"blob {descriptor.digest} is {descriptor.size} bytes; at most {limit} are accepted"
        )
    data = b"".join(store.open_blob(descriptor))
    check(digest_of(data), len(data), descriptor)
    return data
