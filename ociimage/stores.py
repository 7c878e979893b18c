# SPDX-License-Identifier: Apache-2.0
"""From a reference to the store that holds it, and to the image manifest it means."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cryoci.errors import ImageError, IntegrityError, NotFoundError, RegistryError, UsageError
from cryoci.ociimage import blob, nearby, registries
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_CONFIG,
    ImageConfig,
    Index,
    Manifest,
    goarch,
)
from cryoci.ociimage.reference import DEFAULT_TAG, LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions


@dataclass(frozen=True)
class Resolved:
    """An image as a reference led to it: `index` is None when the tag leads straight to a manifest."""

    top: blob.Fetched
    index: Index | None
    manifest: Manifest
    manifest_bytes: bytes
    manifest_digest: str
    manifest_type: str


def open_store(
    ref: LayoutRef | RegistryRef, options: RegistryOptions | None = None, *, create: bool = False
) -> Layout | Registry:
    """The layout or repository of `ref`; `create` makes a missing layout. Raises NotFoundError."""
    if isinstance(ref, LayoutRef):
        return Layout(ref.path, create=create)
    registries.check(ref)
    return Registry(ref, options)


def open_source(ref: LayoutRef | RegistryRef, options: RegistryOptions | None = None) -> Layout | Registry:
    """As `open_store`, to read an image from: the first mirror of registries.conf that has it comes first.

    What a mirror gives is checked like everything else, and policies know the image by the name in `ref`.
    """
    if isinstance(ref, LayoutRef):
        return Layout(ref.path)
    *mirrors, last = registries.sources(ref)
    for source in mirrors:
        try:
            store = Registry(source.ref, _relaxed(options, insecure=source.insecure))
            store.get_manifest(source_name(source.ref, store))
            store.near = nearby.of_repository(
                ref.host, ref.repository
            )  # known by the name in `ref` there, too
            return store
        except (RegistryError, NotFoundError, ImageError):
            continue  # the next one; if the last fails too, its error is the one to tell
    return Registry(last.ref, _relaxed(options, insecure=last.insecure))


def _relaxed(options: RegistryOptions | None, *, insecure: bool) -> RegistryOptions:
    options = options or RegistryOptions()
    return replace(options, insecure=True) if insecure else options


def target_name(ref: LayoutRef | RegistryRef) -> str:
    """The name under which an image is written. Raises UsageError for a digest, which cannot be chosen."""
    if ref.digest is not None:
        raise UsageError(f"cannot write to {ref}: a digest is computed, not chosen", hint="give a tag")
    return (ref.name if isinstance(ref, LayoutRef) else ref.tag) or DEFAULT_TAG


def source_name(ref: LayoutRef | RegistryRef, store: Layout | Registry) -> str:
    """The name or digest by which an image is read; a layout with one image needs none."""
    if ref.digest is not None:
        return ref.digest
    if isinstance(ref, RegistryRef):
        return ref.tag or DEFAULT_TAG
    if ref.name is not None:
        return ref.name
    assert isinstance(store, Layout)
    entries = store.entries()
    if len(entries) == 1:
        return entries[0].digest
    raise UsageError(
        f"{ref} holds {len(entries)} images",
        hint=f"name one: {ref}:NAME ({', '.join(store.names()[:8]) or 'none'})",
    )


def resolve(store: Layout | Registry, reference: str) -> Resolved:
    """Follow a name or digest to the image manifest for this machine. Raises NotFoundError, ImageError."""
    top = store.get_manifest(reference)
    if top.media_type in MANIFEST_TYPES:
        image = Manifest.parse(top.data)
        return Resolved(top, None, image, top.data, top.digest, top.media_type)
    if top.media_type not in INDEX_TYPES:
        raise ImageError(f"{reference} is of type {top.media_type[:100]!r}, not an image")
    index = Index.parse(top.data)
    chosen = index.select(goarch())
    inner = store.get_manifest(chosen.digest)
    if len(inner.data) != chosen.size or inner.digest != chosen.digest:
        raise IntegrityError(f"manifest {chosen.digest} is not the one that the index promises")
    return Resolved(top, index, Manifest.parse(inner.data), inner.data, inner.digest, chosen.media_type)


def read_config(store: Layout | Registry, manifest: Manifest) -> ImageConfig:
    """The verified image config of `manifest`; it must describe as many layers as the manifest has."""
    config = ImageConfig.parse(blob.read_small(store, manifest.config, MAX_CONFIG))
    if len(config.diff_ids) != len(manifest.layers):
        raise ImageError(
            f"the image config describes {len(config.diff_ids)} layers, the manifest {len(manifest.layers)}"
        )
    return config


def confirm(store: Layout | Registry, name: str, digest: str) -> None:
    """Read a tag back and compare. Raises IntegrityError when it leads elsewhere."""
    found = store.get_manifest(name)
    if found.digest != digest:
        raise IntegrityError(
            f"{name} was written as {digest} and reads back as {found.digest}",
            hint="somebody else writes the same tag; push again under another",
        )
