# SPDX-License-Identifier: Apache-2.0
"""Images from store to store as they are: no recompression, same digests, each blob verified on its way."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass

from cryoci.ociimage import annotations as families
from cryoci.ociimage import blob, parallel, referrers, stores
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.unpack import Gate


@dataclass(frozen=True)
class CopyResult:
    """An image that was copied and read back; `skipped` of its `size` bytes were there before."""

    digest: str
    manifest_digest: str
    size: int
    seconds: float
    reference: str
    skipped: int


def copy(
    source: LayoutRef | RegistryRef,
    target: LayoutRef | RegistryRef,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    gate: Gate | None = None,
) -> CopyResult:
    """Copy the image at `source` to `target`, its signatures and attestations with it, tagged last.

    Of an index only this machine's platform travels. `gate` is as in `unpack.pull`. Raises NotFoundError,
    IntegrityError, RegistryError, SpaceError; then nothing is tagged.
    """
    began = time.monotonic()
    seen = progress or Silent()
    name = stores.target_name(target)
    origin = stores.open_source(source, registry_options)
    found = stores.resolve(origin, stores.source_name(source, origin))
    if gate is not None:
        gate(origin, found.top.digest)
    store = stores.open_store(target, registry_options, create=True)
    # the registry has every blob already when both are its own: it need only be told
    beside = None
    if isinstance(origin, Registry) and isinstance(store, Registry) and origin.host == store.host:
        beside = origin.repository if origin.repository != store.repository else None

    def move(part: Descriptor, stop: parallel.Stop) -> blob.Stored:
        token = seen.start(part.annotations.get(families.LAYER_KIND, part.digest[7:19]), part.size)
        if beside is not None and isinstance(store, Registry) and store.mount_blob(part, beside):
            seen.advance(token, part.size)
            seen.done(token)
            return blob.Stored(part.digest, part.size, 0)
        # put_blob checks every byte against `part`; hashing here too would only cost time
        read = lambda start=0: stop.guard(origin.raw_blob(part, start))  # noqa: E731
        readable = blob.Opened(read, seeker=read)
        stored = store.put_blob(readable, part, lambda n: seen.advance(token, n))
        seen.done(token)
        return stored

    remembering = store.remembering("blobs") if isinstance(store, Registry) else nullcontext()
    with store.session(), remembering:
        unique = {part.digest: part for part in (found.manifest.config, *found.manifest.layers)}
        parts = parallel.each(move, list(unique.values()))
        inside = None if found.index else name
        store.put_manifest(found.manifest_bytes, found.manifest_type, inside)
        for digest in dict.fromkeys((found.top.digest, found.manifest_digest)):
            referrers.copy(origin, store, digest)
        if found.index:
            store.put_manifest(found.top.data, found.top.media_type, name)
        stores.confirm(store, name, found.top.digest)
    return CopyResult(
        found.top.digest,
        found.manifest_digest,
        sum(part.size for part in parts),
        time.monotonic() - began,
        str(target),
        sum(part.size for part in parts if not part.sent),
    )
