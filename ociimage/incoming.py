# SPDX-License-Identifier: Apache-2.0
"""Layers on their way into a checkpoint directory: fetched, verified, decompressed and unpacked in one pass.

What a killed pull had unpacked of a layer is put together to the start of its tar again, and only the frames that
follow are fetched. That tar is hashed from its first byte and must have the diff id that the image's config, whose
digest was verified, promises. If it has not, all of the layer is fetched and compared with its own digest.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci.errors import ImageError, IntegrityError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import blob, extract, inflate, parallel
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED, LAYER_TYPES, Descriptor
from cryoci.ociimage.partial import STEP, Layer, Member, Partial
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.registry import Registry

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities

Opener = Callable[[Iterable[bytes]], Iterator[bytes]]  # from a blob to what is compressed in it
RESERVE = 64 << 20  # bytes of the file system that a checkpoint never takes


@dataclass(frozen=True)
class Wanted:
    """A layer to fetch: its number, what opens its blob, and the digest of its tar."""

    number: int
    descriptor: Descriptor
    opener: Opener
    diff_id: str


class Incoming:
    """The layers of one image on their way from `store` into `partial`."""

    def __init__(
        self, store: Layout | Registry, partial: Partial, extractor: extract.Extractor, progress: Progress
    ) -> None:
        self._store = store
        self._partial = partial
        self._extractor = extractor
        self._progress = progress

    def get(self, layers: Sequence[Wanted]) -> int:
        """Fetch and unpack all; returns the bytes of blobs that were not fetched, being there from before.

        Raises IntegrityError, ImageError, SpaceError, RegistryError.
        """
        with parallel.Threads("cryoci-inflate", len(layers) - 1) as pool:
            return sum(parallel.each(lambda wanted, stop: self._get(wanted, pool, stop), layers))

    def _get(self, wanted: Wanted, pool: parallel.Threads, stop: parallel.Stop) -> int:
        layer = wanted.descriptor
        shown = _Shown(self._progress, layer)
        there = 0
        kept = self._partial.kept(wanted.number)
        if kept is not None:
            there = layer.size if kept.whole else kept.blob
            shown.advance(there)
            try:
                self._take_up(wanted, kept, pool, stop, shown)
            except ImageError:
                self._partial.anew(wanted.number)
                shown.anew()
                kept, there = None, 0
        if kept is None:
            account = _Account(self._partial, wanted.number, Layer())
            incoming = inflate.ahead(shown.of(stop.guard(self._store.open_blob(layer))))
            try:
                self._extractor.extract(self._inflated(wanted, incoming, pool, account), account=account)
            finally:
                incoming.close()
            account.whole()
        self._progress.done(shown.token)
        return there

    def _take_up(
        self, wanted: Wanted, kept: Layer, pool: parallel.Threads, stop: parallel.Stop, shown: _Shown
    ) -> None:
        """Unpack a layer of which `kept` is there. Raises ImageError, and has then removed what it had made."""
        account = _Account(self._partial, wanted.number, kept)
        rest = kept.whole or kept.blob >= wanted.descriptor.size
        chunks = iter(()) if rest else self._store.raw_blob(wanted.descriptor, kept.blob)
        incoming = inflate.ahead(shown.of(stop.guard(chunks)))

        def content() -> Iterator[bytes]:
            digest = blob.Digest()
            for piece in chain(kept.content(self._partial.files), fetched):
                digest.update(piece)
                yield piece
            if digest.result() != wanted.diff_id:
                raise IntegrityError(f"what there was of layer {wanted.descriptor.digest} is no part of it")

        if kept.blob == kept.raw:  # not compressed, and begins wherever it does
            fetched = inflate.plain(incoming, account.ended)
        else:
            fetched = self._inflated(wanted, incoming, pool, account, kept.raw)
        try:
            self._extractor.extract(content(), account=account)
        finally:
            incoming.close()
        account.whole()

    def _inflated(
        self,
        wanted: Wanted,
        chunks: Iterable[bytes],
        pool: parallel.Threads,
        account: _Account,
        before: int = 0,
    ) -> Iterator[bytes]:
        limit = raw_limit(wanted.descriptor, sys.maxsize) - before
        return inflate.inflate(
            wanted.opener(chunks), pool, limit=limit, room=room(self._partial.files), ended=account.ended
        )


class _Shown:
    """What progress has been told of one layer."""

    def __init__(self, progress: Progress, layer: Descriptor) -> None:
        self.token = progress.start(
            layer.annotations.get(families.LAYER_KIND, layer.digest[7:19]), layer.size
        )
        self._progress = progress
        self._size = 0

    def advance(self, size: int) -> None:
        self._size += size
        self._progress.advance(self.token, size)

    def anew(self) -> None:
        self.advance(-self._size)

    def of(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """`chunks`, told as they pass."""
        for chunk in chunks:
            self.advance(len(chunk))
            yield chunk


class _Account:
    """Tells the journal of one layer, from what was `kept` of it on."""

    def __init__(self, partial: Partial, number: int, kept: Layer) -> None:
        self._partial, self._number, self._kept = partial, number, kept
        self._known = len(kept.members)
        self._raw = 0
        self._noted = kept.raw
        self._ends: deque[tuple[int, int]] = deque()

    def present(self) -> Mapping[str, int]:
        return self._kept.present()

    def member(self, name: str, size: int, head: bytes) -> None:
        if self._known:
            self._known -= 1
        else:
            self._partial.member(self._number, Member(name, size, head))

    def ended(self, place: int, raw: int) -> None:
        """The frame that ends so far behind what was kept has been decompressed."""
        self._ends.append((self._kept.blob + place, self._kept.raw + raw))

    def written(self, size: int) -> None:
        self._raw += size
        last = None
        while self._ends and self._ends[0][1] <= self._raw:
            last = self._ends.popleft()
        if last is not None and last[1] - self._noted >= STEP:
            self._partial.reached(self._number, last[1], last[0])
            self._noted = last[1]

    def whole(self) -> None:
        """All of the layer is there and verified."""
        self._partial.whole(self._number, self._raw)


def raw_limit(descriptor: Descriptor, most: int) -> int:
    """The most bytes a layer's tar may have: what it says itself, and never more than `most`."""
    said = descriptor.annotations.get(families.LAYER_RAW_SIZE, "")
    return min(most, int(said)) if said.isascii() and said.isdigit() and len(said) < 18 else most


def room(directory: Path) -> int:
    """The bytes that a checkpoint may take in `directory`."""
    space = os.statvfs(directory)
    return max(0, space.f_bavail * space.f_frsize - RESERVE)


def check_type(layer: Descriptor) -> None:
    """Raise ImageError for a layer that is no tar."""
    if layer.media_type.removesuffix(ENCRYPTED) not in LAYER_TYPES:
        raise ImageError(f"layer {layer.digest} is of type {layer.media_type[:100]!r}")


def openers_of(layers: Sequence[Descriptor], identities: Identities | None) -> Sequence[Opener]:
    """What makes each blob the compressed tar that it holds. Raises TrustError when no identity opens it."""
    for layer in layers:
        check_type(layer)
    if not any(layer.media_type.endswith(ENCRYPTED) for layer in layers):
        return [iter for _ in layers]
    # imported here, because an image in the clear needs no cryptography
    from cryoci.ociimage.seal.layers import openers

    return openers(layers, identities)
