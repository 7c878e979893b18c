# SPDX-License-Identifier: Apache-2.0
"""Removing images, and with the last name of one the signatures and attestations that are attached to it."""

from __future__ import annotations

from cryoci.errors import ConflictError, ImageError, NotFoundError, RegistryError
from cryoci.ociimage import referrers, stores, strictjson
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import MAX_MANIFEST, Index
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions

_SUFFIXES = ("", ".sig", ".att", ".sbom")  # of the tags that belong to a digest


def remove(ref: LayoutRef | RegistryRef, *, registry_options: RegistryOptions | None = None) -> int:
    """Remove an image by name or digest; returns the bytes freed here.

    A layout frees blobs at once, unless another process is writing to it. A registry frees them at its own
    collection, so 0 is returned. Raises NotFoundError, ConflictError, RegistryError.
    """
    store = stores.open_store(ref, registry_options)
    name = stores.source_name(ref, store)
    if isinstance(store, Layout):
        remove_names(store, store.find(name).digest, [name])
        return store.collect()
    digest = store.get_manifest(name).digest
    subjects = _subjects(store, digest)
    _remove_remote(store, name, digest)
    _detach(store, digest, subjects)
    return 0


def remove_names(store: Layout | Registry, digest: str, names: list[str]) -> None:
    """Remove an image whose only `names` are these; a layout's blobs stay until it is collected."""
    subjects = _subjects(store, digest)
    if isinstance(store, Layout):
        for name in names:
            store.untag(name)
    else:
        store.delete_manifest(digest)  # and with it every tag
    _detach(store, digest, subjects)


def _subjects(store: Layout | Registry, digest: str) -> list[str]:
    """What signatures of an image may be attached to: its index, and the manifests in it."""
    try:
        index = Index.parse(store.get_manifest(digest).data)
        return [digest, *(entry.digest for entry in index.manifests)]
    except (ImageError, NotFoundError):
        return [digest]  # a single manifest, or damaged


def _detach(store: Layout | Registry, digest: str, subjects: list[str]) -> None:
    """Remove what is attached to `subjects`, unless some name still leads to the image."""
    if isinstance(store, Layout):
        if any(entry.digest == digest for entry in store.entries()):
            return
        for subject in subjects:
            for suffix in _SUFFIXES:
                try:
                    store.untag(referrers.tag(subject, suffix))
                except NotFoundError:
                    continue
        return
    try:
        names = store.names()
    except NotFoundError:
        return  # that was all of the repository
    if any(not referrers.is_referrer_tag(name) and _leads_to(store, name, digest) for name in names):
        return
    for subject in subjects:
        for entry in referrers.listed(store, subject):
            if _refers(store, entry.digest, subject):
                store.delete_manifest(entry.digest)
        for name in (referrers.tag(subject, suffix) for suffix in _SUFFIXES):
            if name in names and not store.delete_manifest(name):
                store.delete_manifest(store.get_manifest(name).digest)


def _refers(store: Registry, artifact: str, subject: str) -> bool:
    """Whether an artifact says itself that it belongs to `subject`: a list may name anything."""
    try:
        data = store.get_manifest(artifact).data
    except (ImageError, NotFoundError):
        return False
    said = strictjson.load_object(data, "artifact", limit=MAX_MANIFEST).get("subject")
    return isinstance(said, dict) and said.get("digest") == subject


def _remove_remote(store: Registry, name: str, digest: str) -> None:
    if name == digest or not store.delete_manifest(name):
        # many registries delete by digest only, and that takes every tag of the image along
        others = (
            [] if name == digest else [t for t in store.names() if t != name and _leads_to(store, t, digest)]
        )
        if others:
            raise ConflictError(
                f"{store.host} cannot delete a tag alone, and {', '.join(others[:8])} lead to the same",
                hint=f"remove all of them at once: cryoci rm {store.host}/{store.repository}@{digest}",
            )
        store.delete_manifest(digest)
    try:
        store.get_manifest(name)
    except NotFoundError:
        return
    raise RegistryError(
        f"{store.host} said that it deleted {store.repository}:{name}, but it is still there"
    )


def _leads_to(store: Registry, tag: str, digest: str) -> bool:
    try:
        return store.get_manifest(tag).digest == digest
    except NotFoundError:
        return False
