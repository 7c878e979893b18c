# SPDX-License-Identifier: Apache-2.0
"""A stock: layers that are stored one by one, before the image that they are for can be written.

Each holds one file, which need not have a name on this node. Until their image is there, an image of these layers
alone has them under a name of its own, so that no collection takes them; by its digest the files can be had again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

from cryoci.errors import CryociError, ImageError, IntegrityError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, blob, chunks, frames, inflate, layers, parallel, stores, tar
from cryoci.ociimage.incoming import raw_limit
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import CONFIG, MANIFEST, Descriptor, ImageConfig, Manifest, digest_of, goarch
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions


class Stock:
    """Puts files as layers into `store`; close it. Methods may be called from any thread."""

    def __init__(self, store: Layout | Registry, compression: str) -> None:
        self._store = store
        self._codec = layers.Compression.parse(compression)
        self._pool = frames.Pool(self._codec)
        self._stop = parallel.Stop()
        self._lock = threading.Lock()
        self._layers: list[chunks.Shared] = []

    def put(self, name: str, fd: int, digest: str = "") -> chunks.Shared:
        """Store the open file `fd` as `name` of the checkpoint; `digest` (hex, or none) is that of a chunk of memory.

        When it returns the store has acknowledged it. Raises ImageError, RegistryError, SpaceError.
        """
        if not archive.allowed(name):
            raise archive.unknown(name)
        size = os.fstat(fd).st_size
        plan = layers.Plan(name, (archive.File(name, size),), layers.folders_of((name,)))
        writer = layers.Writer(Path(), plan, self._pool, lambda n: None, fd=fd)
        source = blob.Opened(lambda: self._stop.guard(writer.open()))
        stored = self._store.put_blob(source, None, lambda n: None)
        [marks] = chunks.notes([(name,)], {name: digest} if digest else {})
        descriptor = Descriptor(self._codec.media_type, stored.digest, stored.size, plan.annotations | marks)
        layer = chunks.Shared(descriptor, writer.diff_id or stored.digest, {name: digest}, size)
        with self._lock:
            self._layers.append(layer)
        return layer

    def seal(self, name: str, annotations: Mapping[str, str]) -> str:
        """Write the image of all layers under `name`, and see that the store has all of it; returns its digest.

        Raises IntegrityError, RegistryError...
        """
        with self._lock:
            found = list(self._layers)
        config = ImageConfig(
            goarch(),
            "1970-01-01T00:00:00Z",
            [layer.diff_id for layer in found],
            [f"cryoci checkpoint: {next(iter(layer.files))}" for layer in found],
        ).to_bytes()
        noted = Descriptor(CONFIG, digest_of(config), len(config))
        self._store.put_blob(blob.Bytes(config), noted, lambda n: None)
        image = Manifest(noted, [layer.descriptor for layer in found], annotations).to_bytes()
        digest = self._store.put_manifest(image, MANIFEST, name)
        if isinstance(self._store, Layout):
            self._store.pin(name, True)
        stores.confirm(self._store, name, digest)

        def there(layer: chunks.Shared, stop: parallel.Stop) -> bool:
            return self._store.has_blob(layer.descriptor.digest, layer.descriptor.size)

        for layer, answer in zip(found, parallel.each(there, found), strict=True):
            if not answer:
                raise IntegrityError(
                    f"{next(iter(layer.files))} was stored as {layer.descriptor.digest}, which is not there now",
                    hint="see the registry's log, and its collection of blobs",
                )
        return digest

    def stop(self) -> None:
        """What is being put fails at its next piece."""
        self._stop.set()

    def close(self) -> None:
        self._pool.__exit__()


class Stocked:
    """What a stock holds, by the reference of its image, with a digest.

    Raises NotFoundError, RegistryError, ImageError.
    """

    def __init__(self, ref: LayoutRef | RegistryRef, options: RegistryOptions | None = None) -> None:
        self._store = stores.open_store(ref, options)
        self._digest = ref.digest or ""
        image = Manifest.parse(self._store.get_manifest(self._digest).data)
        self._layers = {layer.annotations.get(families.TITLE, ""): layer for layer in image.layers}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each layer's tar, by the name of its file."""
        return {name: raw_limit(layer, sys.maxsize) for name, layer in self._layers.items()}

    def fetch(self, name: str, fd: int) -> None:
        """Write the file `name` to the empty file `fd`. Raises ImageError, IntegrityError, RegistryError, OSError.

        What there was written of it is not to be used then.
        """
        layer = self._layers.get(name)
        if layer is None:
            raise ImageError(f"{self._digest} does not hold {name}")
        with (
            parallel.Threads("cryoci-inflate") as pool,
            closing(inflate.ahead(self._store.open_blob(layer))) as incoming,
        ):
            limit = raw_limit(layer, sys.maxsize)
            reader, written = tar.Reader(inflate.inflate(incoming, pool, limit=limit)), False
            for entry in reader:
                wanted = entry.kind == tar.FILE and entry.name == name
                for piece in reader.data():
                    if wanted:
                        _write(fd, piece)
                written = written or wanted
        if not written:
            raise ImageError(f"layer {layer.digest} does not hold {name}")

    def forget(self) -> bool:
        """Remove the image; its layers stay where another one has them. False where the registry removes nothing."""
        with suppress(CryociError, OSError):
            if isinstance(self._store, Layout):
                self._store.untag(self._digest)
                self._store.collect()
                return True
            return self._store.delete_manifest(self._digest)
        return False


def _write(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]
