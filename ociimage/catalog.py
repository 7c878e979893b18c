# SPDX-License-Identifier: Apache-2.0
"""What images there are and what they are, from manifests and metadata layers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryoci.errors import CryociError, NotFoundError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, extract, incoming, inflate, parallel, referrers, stores
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED, Descriptor
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions

MAX_INSPECTED = 64 << 20  # bytes, compressed: a first layer up to this is read for its descriptions
MAX_METADATA = 1 << 30  # bytes of tar that this may become


@dataclass(frozen=True)
class LayerInfo:
    """One layer: sizes in bytes; `raw_size` None when the image does not say."""

    digest: str
    media_type: str
    size: int
    raw_size: int | None
    holds: str


@dataclass(frozen=True)
class ImageInfo:
    """An image as `inspect` sees it. `facts` are named as in families.FACTS; times are RFC 3339."""

    reference: str
    digest: str
    manifest_digest: str
    architecture: str
    created: str
    size: int
    raw_size: int | None
    engine: str
    container_name: str
    container_id: str
    base_image: str
    base_digest: str
    runtime: str
    criu_version: str
    facts: Mapping[str, str]
    annotations: Mapping[str, str]
    layers: tuple[LayerInfo, ...]


@dataclass(frozen=True)
class ImageSummary:
    """One line of a list; `problem` says why an entry could not be read, and the rest is then empty."""

    name: str
    digest: str
    created: str = ""
    size: int = 0
    raw_size: int | None = None
    engine: str = ""
    container_name: str = ""
    base_image: str = ""
    problem: str = ""


def inspect(ref: LayoutRef | RegistryRef, *, registry_options: RegistryOptions | None = None) -> ImageInfo:
    """Everything about an image that can be told without fetching memory or file systems.

    Raises NotFoundError, ImageError, IntegrityError, RegistryError.
    """
    store = stores.open_source(ref, registry_options)
    found = stores.resolve(store, stores.source_name(ref, store))
    noted = {**(found.index.annotations if found.index else {}), **found.manifest.annotations}
    config = stores.read_config(store, found.manifest)
    # what the checkpoint itself says comes second: annotations are what engines and the maker went by
    facts = {**_descriptions(store, found.manifest.layers[0]), **families.read(noted)}
    return ImageInfo(
        str(ref),
        found.top.digest,
        found.manifest_digest,
        config.architecture,
        noted.get(families.CREATED) or config.created,
        found.manifest.config.size + sum(layer.size for layer in found.manifest.layers),
        families.number(noted.get(families.RAW_SIZE)),
        facts.get("engine.name", ""),
        facts.get("container.name", ""),
        facts.get("container.id", ""),
        facts.get("image.name", ""),
        facts.get("image.digest", ""),
        facts.get("runtime.name", ""),
        facts.get("criu.version", ""),
        facts,
        noted,
        tuple(_layer(layer) for layer in found.manifest.layers),
    )


def list_images(
    ref: LayoutRef | RegistryRef, *, registry_options: RegistryOptions | None = None
) -> list[ImageSummary]:
    """The images of a layout or repository, by name; only manifests are read.

    A layout that does not exist yet is empty. One broken image does not hide the others.
    """
    try:
        store = stores.open_store(ref, registry_options)
    except NotFoundError:
        if isinstance(ref, LayoutRef) and not ref.path.exists():
            return []
        raise
    return [summary for summary, _ in listed(store)]


def listed(store: Layout | Registry) -> list[tuple[ImageSummary, Mapping[str, int]]]:
    """The images of a store as `list_images` has them, each with its blobs: their digests and sizes."""
    return [_summary(store, name) for name in store.names() if not referrers.is_referrer_tag(name)]


def _summary(store: Layout | Registry, name: str) -> tuple[ImageSummary, Mapping[str, int]]:
    try:
        found = stores.resolve(store, name)
    except CryociError as e:
        return ImageSummary(name, "", problem=e.message), {}
    noted = {**(found.index.annotations if found.index else {}), **found.manifest.annotations}
    facts = families.read(noted)
    problem = "" if families.is_checkpoint(noted) else "not a checkpoint"
    parts = (found.manifest.config, *found.manifest.layers)
    summary = ImageSummary(
        name,
        found.top.digest,
        noted.get(families.CREATED, ""),
        sum(part.size for part in parts),
        families.number(noted.get(families.RAW_SIZE)),
        facts.get("engine.name", ""),
        facts.get("container.name", ""),
        facts.get("image.name", ""),
        problem,
    )
    return summary, {part.digest: part.size for part in parts}


def _descriptions(store: Layout | Registry, layer: Descriptor) -> dict[str, str]:
    """The facts in config.dump, spec.dump and cryoci.json; none when the layer holds memory too or is sealed."""
    if layer.size > MAX_INSPECTED or layer.media_type.endswith(ENCRYPTED):
        return {}
    incoming.check_type(layer)
    with parallel.Threads("cryoci-inflate", workers=1) as pool:
        chunks = inflate.ahead(store.open_blob(layer))
        try:
            content = inflate.inflate(chunks, pool, limit=incoming.raw_limit(layer, MAX_METADATA))
            return archive.facts(extract.members(content, archive.DESCRIPTIONS, limit=archive.MAX_JSON))
        finally:
            chunks.close()


def _layer(layer: Descriptor) -> LayerInfo:
    noted = layer.annotations
    raw = families.number(noted.get(families.LAYER_RAW_SIZE))
    return LayerInfo(layer.digest, layer.media_type, layer.size, raw, noted.get(families.LAYER_KIND, ""))
