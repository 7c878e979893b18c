# SPDX-License-Identifier: Apache-2.0
"""Chunks of memory as layers: which layers of an earlier image a new one can name instead of holding their bytes.

A chunk file (docs/memory.md) has a digest over its address and content in checkpoint/cryoci-memory.json; annotation
io.cryoci.layer.chunks of a layer lists the files in it with theirs. A layer of the earlier image whose files
the new checkpoint has too, with the same digests, becomes a layer of the new image by its descriptor alone: every
image is whole, and whichever is removed first takes nothing from the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryoci.errors import ImageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, parallel, stores, strictjson
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED, Descriptor
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.unpack import Gate

INDEX = "checkpoint/cryoci-memory.json"
PREFIX, SUFFIX = "checkpoint/cryoci-memory-", ".img"
_LIMIT = 64 << 20  # bytes of the index
_MOST = 2 << 20  # bytes of all these annotations; a manifest has 4 MiB
_ENTRY = re.compile(r"([0-9]{1,7}-[0-9a-f]{1,16}):([0-9a-f]{64})\Z")


@dataclass(frozen=True)
class Shared:
    """A layer that is stored already, of an earlier image for one: its uncompressed digest, and its files with their
    digests. `size` is bytes of files that are nowhere else."""

    descriptor: Descriptor
    diff_id: str
    files: Mapping[str, str]
    size: int = 0


@dataclass(frozen=True)
class Parent:
    """An earlier image: its digest, its annotations, and its layers of chunks; `problem` says why there are none.

    `host` and `repository` say where it is, in a registry.
    """

    digest: str
    annotations: Mapping[str, str]
    layers: tuple[Shared, ...]
    problem: str = ""
    host: str = ""
    repository: str = ""

    def select(self, digests: Mapping[str, str], store: Layout | Registry, most: int) -> list[Shared]:
        """The layers, at most so many, that a checkpoint with these chunks can name in `store`, which has them.

        A registry is told to mount what another of its repositories has.
        """
        fitting = [
            layer
            for layer in self.layers
            if all(digests.get(name) == digest for name, digest in layer.files.items())
        ]
        fitting.sort(key=lambda layer: -layer.descriptor.size)
        beside = ""
        if isinstance(store, Registry) and store.host == self.host and store.repository != self.repository:
            beside = self.repository

        def there(layer: Shared, stop: parallel.Stop) -> bool:
            found = layer.descriptor
            if store.has_blob(found.digest, found.size):
                return True
            return bool(beside) and isinstance(store, Registry) and store.mount_blob(found, beside)

        chosen: list[Shared] = []
        taken = set[str]()
        answers = parallel.each(there, fitting)
        for layer, answer in zip(fitting, answers, strict=True):
            if answer and taken.isdisjoint(layer.files) and len(chosen) < most:
                taken |= layer.files.keys()
                chosen.append(layer)
        return chosen


def parent(
    ref: LayoutRef | RegistryRef, options: RegistryOptions | None = None, gate: Gate | None = None
) -> Parent:
    """The image at `ref` as a parent; `gate` is as in `unpack.pull`.

    Raises TrustError, NotFoundError, ImageError, IntegrityError, RegistryError.
    """
    store = stores.open_source(ref, options)
    found = stores.resolve(store, stores.source_name(ref, store))
    if gate is not None:
        gate(store, found.top.digest)
    noted = {**(found.index.annotations if found.index else {}), **found.manifest.annotations}
    problem = ""
    shared: list[Shared] = []
    if any(layer.media_type.endswith(ENCRYPTED) for layer in found.manifest.layers):
        problem = "its layers are encrypted, under a key of its own"
    else:
        config = stores.read_config(store, found.manifest)
        for layer, diff_id in zip(found.manifest.layers, config.diff_ids, strict=True):
            files = parse(layer.annotations.get(families.LAYER_CHUNKS, ""))
            if files:
                shared.append(Shared(layer, diff_id, files))
        if not shared:
            problem = "it holds no memory out of band"
    host, repository = (ref.host, ref.repository) if isinstance(ref, RegistryRef) else ("", "")
    return Parent(found.top.digest, noted, tuple(shared), problem, host, repository)


def of(checkpoint: archive.Checkpoint) -> dict[str, str]:
    """The digests of the chunk files of `checkpoint`, by name; {} for one without, or whose chunks have none.

    Raises ImageError when some of them lie in other directories.
    """
    names = {file.name for file in checkpoint.files}
    if INDEX not in names:
        return {}
    data = archive.read(checkpoint.path / INDEX, _LIMIT)
    value = strictjson.load_object(data, INDEX, limit=_LIMIT)
    if value.get("sources"):
        raise ImageError(
            f"memory of {checkpoint.path} lies in other checkpoint directories, and an image must be whole",
            hint=f"bring it together first: cryoci flatten {checkpoint.path}",
        )
    found = {}
    entries = value.get("chunks")
    for entry in entries if isinstance(entries, list) else ():
        name, digest = _entry(entry)
        if name in names and digest:
            found[name] = digest
    return found


def _entry(entry: Any) -> tuple[str, str]:
    try:
        pid, start, _, digest = entry
        name = f"{pid}-{start}"
        return (f"{PREFIX}{name}{SUFFIX}", digest) if _ENTRY.match(f"{name}:{digest}") else ("", "")
    except (TypeError, ValueError):
        return "", ""


def notes(layers: Iterable[tuple[str, ...]], digests: Mapping[str, str]) -> list[dict[str, str]]:
    """For each layer, of files of these names, the annotation that says its chunks; none for one with other files."""
    found: list[dict[str, str]] = []
    total = 0
    for names in layers:
        text = ""
        if names and all(name in digests for name in names):
            text = ",".join(f"{name[len(PREFIX) : -len(SUFFIX)]}:{digests[name]}" for name in names)
            total += len(text)
        found.append({families.LAYER_CHUNKS: text} if text and total <= _MOST else {})
    return found


def parse(text: str) -> dict[str, str]:
    """Names and digests in such an annotation; {} when it is none."""
    found = {}
    for part in text.split(",") if text else ():
        match = _ENTRY.match(part)
        if not match:
            return {}
        found[f"{PREFIX}{match[1]}{SUFFIX}"] = match[2]
    return found
