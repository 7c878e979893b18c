# SPDX-License-Identifier: Apache-2.0
"""From an image or an engine's archive to a checkpoint directory: verified, staged, renamed in place.

Everything goes to a sibling directory first; it takes its name only after every digest was checked and the
result validated. On any error nothing is left.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci import files
from cryoci.errors import ConflictError, ImageError, NotFoundError, PrivilegeError, UsageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, blob, ctr, extract, inflate, ociarchive, parallel, stores
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED, INDEX_TYPES, LAYER_TYPES, MAX_MANIFEST, Descriptor, Index
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.reference import ArchiveRef, LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities

Opener = Callable[[Iterable[bytes]], Iterator[bytes]]  # from a blob to what is compressed in it
WORKERS = 2  # decompressing threads
LOADED = "loaded"  # the name of the one image of a saved archive, in its scratch layout
Gate = Callable[[blob.Store | None, str | None], None]
RESERVE = 64 << 20  # bytes of the file system that a checkpoint never takes


@dataclass(frozen=True)
class PulledImage:
    """A checkpoint directory that was made: `size` bytes fetched, `raw_size` bytes of files."""

    directory: Path
    digest: str
    manifest_digest: str
    size: int
    raw_size: int
    seconds: float
    reference: str
    annotations: Mapping[str, str]
    checkpoint: archive.Checkpoint


def pull(
    ref: LayoutRef | RegistryRef | ArchiveRef,
    directory: Path,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    gate: Gate | None = None,
    identities: Identities | None = None,
) -> PulledImage:
    """Unpack `ref` to `directory`, which must not exist (or be an empty directory).

    `gate` is called with the store and the image's digest (for an archive with None twice) before anything is
    fetched, and refuses by raising. `identities` open what is encrypted. Raises ConflictError, NotFoundError,
    IntegrityError, ImageError, TrustError, SpaceError, RegistryError.
    """
    began = time.monotonic()
    if isinstance(ref, ArchiveRef):
        if gate is not None:
            gate(None, None)
        if ociarchive.looks_like(ref.path):
            return _unpack_layout(ref, directory, progress or Silent(), began, identities)
        return _unpack_archive(ref, directory, progress or Silent(), began)
    store = stores.open_source(ref, registry_options)
    found = stores.resolve(store, stores.source_name(ref, store))
    if gate is not None:
        gate(store, found.top.digest)
    noted = {**(found.index.annotations if found.index else {}), **found.manifest.annotations}
    if not families.is_checkpoint(noted):
        raise ImageError(
            f"{ref} is an image, but not of a checkpoint: it has none of the checkpoint annotations",
            hint="images made with buildah need --annotation org.criu.checkpoint.container.name=NAME",
        )
    stores.read_config(store, found.manifest)
    layers = found.manifest.layers
    openers = openers_of(layers, identities)
    with staged(directory) as stage:
        with extract.Extractor(stage) as extractor, ThreadPoolExecutor(WORKERS, "cryoci-inflate") as pool:
            _get_layers(store, layers, openers, extractor, pool, stage, progress or Silent())
        checkpoint = archive.validate(stage)
    return PulledImage(
        directory,
        found.top.digest,
        found.manifest_digest,
        sum(layer.size for layer in layers),
        checkpoint.size,
        time.monotonic() - began,
        str(ref),
        noted,
        replace(checkpoint, path=directory),
    )


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A private sibling directory that becomes `directory` when the block ends well, else vanishes."""
    if directory.is_symlink() or (
        directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise ConflictError(
            f"{directory} exists and is not an empty directory", hint="name another, or remove it"
        )
    if directory.name in ("", ".."):
        raise UsageError(f"{directory} cannot be made", hint="name the directory to make")
    stage = directory.parent / f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir(mode=0o700)
    except PermissionError as e:
        raise PrivilegeError(
            f"cannot write in {directory.parent}", hint="run as root, or name another place"
        ) from e
    try:
        yield stage
        os.rename(stage, directory)
        files.sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def raw_limit(descriptor: Descriptor, room: int) -> int:
    """The most bytes a layer's tar may have: what it says itself, and never more than there is room for."""
    said = descriptor.annotations.get(families.LAYER_RAW_SIZE, "")
    return min(room, int(said)) if said.isascii() and said.isdigit() and len(said) < 18 else room


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


def _room(stage: Path) -> int:
    space = os.statvfs(stage)
    return max(0, space.f_bavail * space.f_frsize - RESERVE)


def _get_layers(
    store: Layout | Registry,
    layers: Sequence[Descriptor],
    openers: Sequence[Opener],
    extractor: extract.Extractor,
    pool: Executor,
    stage: Path,
    progress: Progress,
) -> None:
    def get(work: tuple[Descriptor, Opener], stop: parallel.Stop) -> None:
        layer, opener = work
        token = progress.start(layer.annotations.get(families.LAYER_KIND, layer.digest[7:19]), layer.size)
        incoming = inflate.ahead(_told(stop.guard(store.open_blob(layer)), progress, token))
        try:
            extractor.extract(
                inflate.inflate(
                    opener(incoming), pool, limit=raw_limit(layer, sys.maxsize), room=_room(stage)
                )
            )
        finally:
            incoming.close()
        progress.done(token)

    parallel.each(get, list(zip(layers, openers, strict=True)))


def _told(chunks: Iterator[bytes], progress: Progress, token: object) -> Iterator[bytes]:
    for chunk in chunks:
        progress.advance(token, len(chunk))
        yield chunk


def _annotations(checkpoint: archive.Checkpoint) -> dict[str, str]:
    """What its descriptions say. Raises ImageError when no manifest could hold it."""
    try:
        return families.build(checkpoint.facts)
    except UsageError as e:
        raise ImageError(f"the checkpoint describes itself in an odd way: {e.message}") from e


def load_one(ref: ArchiveRef, layout: Layout, progress: Progress | None = None) -> Index | None:
    """Load the one image of a saved archive into `layout` as LOADED; returns its index, if it has one."""
    with layout.session():
        entries = ociarchive.load(ref.path, layout, progress=progress)
        if len(entries) != 1:
            raise ImageError(
                f"{ref} holds {len(entries)} images", hint=f"load them, then name one: cryoci load {ref}"
            )
        entry = entries[0][1]
        data = blob.read_small(layout, entry, MAX_MANIFEST)
        layout.put_manifest(data, entry.media_type, LOADED)
    return Index.parse(data) if entry.media_type in INDEX_TYPES else None


def _unpack_layout(
    ref: ArchiveRef, directory: Path, progress: Progress, began: float, identities: Identities | None
) -> PulledImage:
    """An image archive: a checkpoint image that was saved, or one of containerd's own kind."""
    with ociarchive.scratch_layout() as layout:
        index = load_one(ref, layout, progress)
        if index is None or not ctr.is_checkpoint(index):
            inner = pull(LayoutRef(layout.path, LOADED), directory, identities=identities)
            return replace(inner, reference=str(ref))
        digest = layout.get_manifest(LOADED).digest
        with staged(directory) as stage:
            ctr.unpack(layout, index, stage)
            checkpoint = archive.validate(stage)
            noted = _annotations(checkpoint)
    return PulledImage(
        directory,
        digest,
        digest,
        sum(part.size for part in index.manifests),
        checkpoint.size,
        time.monotonic() - began,
        str(ref),
        noted,
        replace(checkpoint, path=directory),
    )


def _unpack_archive(ref: ArchiveRef, directory: Path, progress: Progress, began: float) -> PulledImage:
    try:
        file = open(ref.path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError as e:
        raise NotFoundError(f"no archive at {ref.path}") from e
    except PermissionError as e:
        raise PrivilegeError(f"cannot read {ref.path}", hint="run as root") from e
    digest = hashlib.sha256()

    def read() -> Iterator[bytes]:
        while chunk := file.read(blob.CHUNK):
            digest.update(chunk)
            progress.advance(token, len(chunk))
            yield chunk

    with file:
        size = os.fstat(file.fileno()).st_size
        token = progress.start(ref.path.name, size)
        with staged(directory) as stage:
            incoming = inflate.ahead(read())
            try:
                with (
                    extract.Extractor(stage) as extractor,
                    ThreadPoolExecutor(WORKERS, "cryoci-inflate") as pool,
                ):
                    extractor.extract(inflate.inflate(incoming, pool, limit=sys.maxsize, room=_room(stage)))
            finally:
                incoming.close()
            checkpoint = archive.validate(stage)
            noted = _annotations(checkpoint)
    progress.done(token)
    name = f"sha256:{digest.hexdigest()}"
    return PulledImage(
        directory,
        name,
        name,
        size,
        checkpoint.size,
        time.monotonic() - began,
        str(ref),
        noted,
        replace(checkpoint, path=directory),
    )
