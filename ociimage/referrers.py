# SPDX-License-Identifier: Apache-2.0
"""Artifacts that refer to an image: signatures and attestations, in registries and layouts.

distribution-spec v1.1 "Listing Referrers": by the referrers API where the registry has it, else by an index under
the tag `sha256-HEX` that clients keep up. A layout has no API, so there it is always that index. cosign's older
signatures lie under the tag `sha256-HEX.sig`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from cryoci.errors import ConflictError, ImageError, NotFoundError
from cryoci.ociimage import blob
from cryoci.ociimage.blob import Store
from cryoci.ociimage.manifest import INDEX, MANIFEST, Descriptor, Index, Manifest, digest_of

EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_BYTES = b"{}"
MAX_REFERRERS = 64  # artifacts of one image that are looked at
MAX_COPIED = 16 << 20  # bytes of an artifact that travels with its image
_KEPT = re.compile(r"sha256-[0-9a-f]{64}(?:\.sig|\.att|\.sbom)?\Z")
_TRIES = 5


def tag(digest: str, suffix: str = "") -> str:
    """The tag that belongs to a digest: `sha256-HEX`, with ".sig" for cosign's older signatures."""
    return digest.replace(":", "-") + suffix


def is_referrer_tag(name: str) -> bool:
    """Whether a tag is one of those above rather than an image's."""
    return _KEPT.match(name) is not None


def artifact(
    kind: str, subject: Descriptor, layers: list[Descriptor], annotations: Mapping[str, str]
) -> bytes:
    """The manifest of an artifact of type `kind` that refers to `subject`; fields in the order of Go's."""
    config = Descriptor(EMPTY, digest_of(EMPTY_BYTES), len(EMPTY_BYTES))
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
        "annotations": dict(sorted(annotations.items())),
    }
    return json.dumps(value, separators=(",", ":")).encode()


def attach(
    store: Store, kind: str, subject: Descriptor, content: bytes, annotations: Mapping[str, str]
) -> str:
    """Store `content` as an artifact of type `kind` on `subject`; returns its manifest's digest."""
    layer = Descriptor(kind, digest_of(content), len(content))
    config = Descriptor(EMPTY, digest_of(EMPTY_BYTES), len(EMPTY_BYTES))
    store.put_blob(blob.Bytes(EMPTY_BYTES), config, lambda n: None)
    store.put_blob(blob.Bytes(content), layer, lambda n: None)
    data = artifact(kind, subject, [layer], annotations)
    digest = store.put_manifest(data, MANIFEST, None)
    if store.referrers(subject.digest) is None:
        entry = Descriptor(MANIFEST, digest, len(data), annotations, artifact_type=kind)
        _note(store, subject.digest, [entry])
    return digest


def listed(store: Store, digest: str) -> list[Descriptor]:
    """The artifacts that refer to `digest`, at most MAX_REFERRERS: those of the API, else those of the tag.

    A registry that learned the API later may keep older ones under the tag alone, so both are read.
    """
    found = {entry.digest: entry for entry in _noted(store, digest)}
    found.update((entry.digest, entry) for entry in store.referrers(digest) or [])
    return list(found.values())[:MAX_REFERRERS]


def copy(origin: Store, target: Store, digest: str) -> int:
    """Copy the signatures and attestations of `digest` along with its image; returns how many there were.

    What is damaged or large (somebody's scan report) stays behind: it must not keep the image from travelling.
    """
    copied = []
    try:
        entries = listed(origin, digest)
    except ImageError:
        entries = []
    for entry in entries:
        if (data := _copy_one(origin, target, entry.digest, None)) is not None:
            copied.append(replace(entry, size=len(data)))
    if copied and target.referrers(digest) is None:
        _note(target, digest, copied)
    older = tag(digest, ".sig")
    return len(copied) + (_copy_one(origin, target, older, older) is not None)


def _copy_one(origin: Store, target: Store, reference: str, name: str | None) -> bytes | None:
    """Copy an artifact's blobs and manifest; None when it is not there, or nothing to take along."""
    try:
        found = origin.get_manifest(reference)
        manifest = Manifest.parse(found.data)
        if sum(part.size for part in (manifest.config, *manifest.layers)) > MAX_COPIED:
            return None
        for part in (manifest.config, *manifest.layers):
            data = blob.read_small(origin, part, MAX_COPIED)
            target.put_blob(blob.Bytes(data), part, lambda n: None)
    except (NotFoundError, ImageError):
        return None
    target.put_manifest(found.data, found.media_type, name)
    return found.data


def _noted(store: Store, digest: str) -> list[Descriptor]:
    try:
        found = store.get_manifest(tag(digest))
    except NotFoundError:
        return []
    return list(Index.parse(found.data).manifests)


def _note(store: Store, digest: str, entries: list[Descriptor]) -> None:
    """Add `entries` to the index under the tag of `digest`; read back, since others may write it too."""
    for _ in range(_TRIES):
        known = {entry.digest: entry for entry in _noted(store, digest)}
        known.update((entry.digest, entry) for entry in entries)
        store.put_manifest(Index(list(known.values())).to_bytes(), INDEX, tag(digest))
        if {entry.digest for entry in entries} <= {entry.digest for entry in _noted(store, digest)}:
            return
    raise ConflictError(
        f"the list of what refers to {digest} is being written by others", hint="try again in a moment"
    )
