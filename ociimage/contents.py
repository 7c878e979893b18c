# SPDX-License-Identifier: Apache-2.0
"""Parts of a checkpoint wherever it lies: only what is asked for is fetched and written down.

An image of cryoci's has its small files in the first layer, and each large one in a layer that says so:
`opened` fetches no more than it must. Images of other makers, and archives, are one stream.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci.errors import ImageError, NotFoundError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import (
    archive,
    blob,
    ctr,
    extract,
    incoming,
    inflate,
    ociarchive,
    parallel,
    stores,
    unpack,
)
from cryoci.ociimage.criu.image import DirectoryImages
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED, Descriptor
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef, Reference
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.progress import Progress
    from cryoci.ociimage.seal.keyring import Identities

MAX_FIRST = 64 << 20  # bytes, compressed: a first layer up to this is fetched for its descriptions
GPU = "checkpoint/gpu.dump"  # docs/gpu.dump.schema.json
_DESCRIBED = frozenset({*archive.DESCRIPTIONS, "network.status", "stats-dump", "deleted.files", "dump.log"})
MAX_DESCRIBED = 1 << 30  # bytes of descriptions and CRIU images: about 250 GB of memory in single pages
_SHOWN = 16 << 20  # bytes that are worth a bar
_KINDS = (
    "inventory",
    "pstree",
    "core",
    "mm",
    "pagemap",
    "fdinfo",
    "files",
    "fs",
    "ids",
    "mountpoints",
    "utsns",
)


@dataclass
class Contents:
    """What was fetched, in `directory`; `sizes` has every file of the checkpoint that is known of.

    `complete` is False when layers were left out: those whose content nobody says (`everything` fetches them),
    and encrypted ones (`sealed`).
    """

    directory: Path
    sizes: dict[str, int] = field(default_factory=dict)
    complete: bool = True
    sealed: bool = False
    digest: str = ""
    fetched: int = 0

    @property
    def images(self) -> DirectoryImages:
        """The CRIU images among it."""
        return DirectoryImages(self.directory)


def is_description(name: str) -> bool:
    """Whether a file describes the checkpoint, rather than being its memory or files."""
    folder, slash, base = name.rpartition("/")
    if not slash:
        return name in _DESCRIBED
    if name == GPU:
        return True
    if folder not in ("checkpoint", "pre-checkpoint") or not base.endswith(".img"):
        return False
    return base.removesuffix(".img").partition("-")[0] in _KINDS and not base.startswith("pagemap-shmem")


@contextmanager
def opened(
    ref: Reference,
    keep: Callable[[str], bool] = is_description,
    *,
    everything: bool = False,
    place: Path | None = None,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> Iterator[Contents]:
    """The files of a checkpoint that `keep` accepts, for the time of a with block.

    `everything` fetches layers that do not say what they hold, however large; `progress` is told of large ones.
    `place` is the directory for a scratch copy, by default the system's. `identities` open what is encrypted; without
    any it is left out. Raises TrustError when none of them fits, NotFoundError, ImageError, IntegrityError,
    SpaceError, RegistryError.
    """
    if isinstance(ref, DirectoryRef):
        checkpoint = archive.validate(ref.path)
        yield Contents(ref.path, {file.name: file.size for file in checkpoint.files})
        return
    with tempfile.TemporaryDirectory(prefix="cryoci-", dir=place) as made:
        directory = Path(made)
        if isinstance(ref, ArchiveRef) and not ociarchive.looks_like(ref.path):
            yield _archive(ref, directory, keep, progress)
        elif isinstance(ref, ArchiveRef):
            yield _saved(ref, directory, keep, identities, progress)
        else:
            store = stores.open_source(ref, registry_options)
            name = stores.source_name(ref, store)
            yield _image(store, name, directory, keep, everything, identities, progress)


def _archive(
    ref: ArchiveRef, directory: Path, keep: Callable[[str], bool], progress: Progress | None
) -> Contents:
    try:
        file = open(ref.path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError as e:
        raise NotFoundError(f"no archive at {ref.path}") from e

    def read() -> Iterator[bytes]:
        while chunk := file.read(blob.CHUNK):
            yield chunk

    with file, _extractor(directory, keep) as extractor, _pool() as pool:
        size = os.fstat(file.fileno()).st_size
        incoming = inflate.ahead(_told(progress, f"read {os.path.basename(ref.path)}", size, read()))
        try:
            extractor.extract(inflate.inflate(incoming, pool, limit=sys.maxsize))
        finally:
            incoming.close()
        size = file.tell()
    if not any(name.endswith("checkpoint/inventory.img") for name in extractor.sizes):
        raise ImageError(f"{ref} is not a checkpoint: it has no checkpoint/inventory.img")
    return Contents(directory, extractor.sizes, fetched=size)


def _saved(
    ref: ArchiveRef,
    directory: Path,
    keep: Callable[[str], bool],
    identities: Identities | None,
    progress: Progress | None,
) -> Contents:
    """A saved image; containerd's own kind is unpacked as a whole."""
    with ociarchive.scratch_layout() as layout:
        index = unpack.load_one(ref, layout, progress)
        if index is not None and ctr.is_checkpoint(index):
            ctr.unpack(layout, index, directory)
            return Contents(directory, {f.name: f.size for f in archive.validate(directory).files})
        return _image(layout, unpack.LOADED, directory, keep, True, identities, progress)


def _image(
    store: Layout | Registry,
    name: str,
    directory: Path,
    keep: Callable[[str], bool],
    everything: bool,
    identities: Identities | None,
    progress: Progress | None,
) -> Contents:
    found = stores.resolve(store, name)
    layers = found.manifest.layers
    result = Contents(directory, digest=found.top.digest)
    with _extractor(directory, keep) as extractor, _pool() as pool:
        openers = incoming.openers_of(layers, identities) if identities else [iter for _ in layers]
        for number, (layer, opener) in enumerate(zip(layers, openers, strict=True)):
            incoming.check_type(layer)
            if layer.media_type.endswith(ENCRYPTED) and not identities:
                result.complete, result.sealed = False, True
                continue
            kind = layer.annotations.get(families.LAYER_KIND, "")
            if archive.allowed(kind):
                if keep(kind):
                    _fetch(store, layer, extractor, pool, opener, progress)
                    result.fetched += layer.size
                elif raw := families.number(layer.annotations.get(families.LAYER_RAW_SIZE)):
                    result.sizes[kind] = max(0, raw - _overhead(kind))
            elif everything or (number == 0 and layer.size <= MAX_FIRST):
                _fetch(store, layer, extractor, pool, opener, progress)
                result.fetched += layer.size
            else:
                result.complete = False
    result.sizes.update(extractor.sizes)
    return result


def _extractor(directory: Path, keep: Callable[[str], bool]) -> extract.Extractor:
    """Memory is as large as it is; what merely describes it is bounded."""
    return extract.Extractor(directory, keep, MAX_DESCRIBED if keep is is_description else sys.maxsize)


def _fetch(
    store: Layout | Registry,
    layer: Descriptor,
    extractor: extract.Extractor,
    pool: parallel.Threads,
    opener: incoming.Opener,
    progress: Progress | None,
) -> None:
    name = layer.annotations.get(families.LAYER_KIND, "") or layer.digest[7:19]
    chunks = inflate.ahead(_told(progress, f"fetch {name}", layer.size, store.open_blob(layer)))
    try:
        content = inflate.inflate(opener(chunks), pool, limit=incoming.raw_limit(layer, sys.maxsize))
        extractor.extract(content)
    finally:
        chunks.close()


def _told(progress: Progress | None, name: str, size: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """`chunks` of `size` bytes as they are, told to `progress` where they are many."""
    if progress is None or size < _SHOWN:
        yield from chunks
        return
    token = progress.start(name, size)
    try:
        for chunk in chunks:
            progress.advance(token, len(chunk))
            yield chunk
    finally:
        progress.done(token)


def _overhead(name: str) -> int:
    """About what a layer's tar has besides its one file: headers, and the end."""
    return 1536 + (512 if "/" in name else 0)


def _pool() -> parallel.Threads:
    return parallel.Threads("cryoci-inflate")
