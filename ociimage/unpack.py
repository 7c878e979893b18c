# SPDX-License-Identifier: Apache-2.0
"""From an image or an engine's archive to a checkpoint directory: verified, staged, renamed in place.

Everything goes to a sibling directory first (partial.py); it takes its name only after every digest was checked and
the result validated. On any error nothing is left.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci import files
from cryoci.errors import ImageError, NotFoundError, PrivilegeError, UsageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, blob, ctr, extract, inflate, ociarchive, parallel, partial, stores
from cryoci.ociimage.incoming import Incoming, Wanted, openers_of, room
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED, INDEX_TYPES, MAX_MANIFEST, Index
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.reference import ArchiveRef, LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities

LOADED = "loaded"  # the name of the one image of a saved archive, in its scratch layout
Gate = Callable[[blob.Store | None, str | None], None]


@dataclass(frozen=True)
class PulledImage:
    """A checkpoint directory that was made, of `size` bytes of blobs and `raw_size` bytes of files.

    `skipped` bytes of the blobs were not fetched, because a pull that was killed had. `kept`: the directory was there
    before, and stays.
    """

    directory: Path
    digest: str
    manifest_digest: str
    size: int
    raw_size: int
    seconds: float
    reference: str
    annotations: Mapping[str, str]
    checkpoint: archive.Checkpoint
    skipped: int = 0
    kept: bool = False


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
    fetched, and refuses by raising. `identities` open what is encrypted. What a pull of the same that was killed
    had fetched is taken up, unless it is encrypted. Raises ConflictError, NotFoundError, IntegrityError, ImageError,
    TrustError, SpaceError, RegistryError.
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
    diff_ids = stores.read_config(store, found.manifest).diff_ids
    layers = found.manifest.layers
    openers = openers_of(layers, identities)
    wanted = [Wanted(i, *parts) for i, parts in enumerate(zip(layers, openers, diff_ids, strict=True))]
    # no digest of what is to stay secret is in the image, so what was decrypted before cannot be verified again
    sealed = any(layer.media_type.endswith(ENCRYPTED) for layer in layers)
    again = isinstance(store, Registry) and not sealed and not files.passing(directory)
    with partial.opened(directory, found.manifest_digest if again else "") as stage:
        with extract.Extractor(stage.files) as extractor:
            skipped = Incoming(store, stage, extractor, progress or Silent()).get(wanted)
        checkpoint = archive.validate(stage.files)
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
        skipped,
    )


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
        with partial.opened(directory) as stage:
            ctr.unpack(layout, index, stage.files)
            checkpoint = archive.validate(stage.files)
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
        with partial.opened(directory) as stage:
            incoming = inflate.ahead(read())
            try:
                with (
                    extract.Extractor(stage.files) as extractor,
                    parallel.Threads("cryoci-inflate") as pool,
                ):
                    content = inflate.inflate(incoming, pool, limit=sys.maxsize, room=room(stage.files))
                    extractor.extract(content)
            finally:
                incoming.close()
            checkpoint = archive.validate(stage.files)
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
