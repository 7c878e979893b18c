# SPDX-License-Identifier: Apache-2.0
"""Signing an image where it lies, so that cosign 2, cosign 3 and podman's policy.json can verify it.

The index and the image manifest in it are both signed: containerd and cryoci go by the index, podman and CRI-O by
the manifest. Each gets a simple signature under `sha256-HEX.sig` and a sigstore bundle as referrer.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime

from cryoci.errors import ImageError, NotFoundError
from cryoci.ociimage import blob, referrers, stores
from cryoci.ociimage.manifest import CONFIG, MANIFEST, Descriptor, Manifest, digest_of, rfc3339
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.trust import envelope, provenance
from cryoci.ociimage.trust.keys import SigningKey

MAX_SIGNATURES = 64  # of one image, in its .sig manifest


@dataclass(frozen=True)
class Signed:
    """An image that was signed: `digests` are those of its index and manifest."""

    reference: str
    digest: str
    digests: tuple[str, ...]
    key: str
    provenance: bool


def sign(
    ref: LayoutRef | RegistryRef,
    key: SigningKey,
    *,
    with_provenance: bool = True,
    expected: str | None = None,
    node: str | None = None,
    registry_options: RegistryOptions | None = None,
) -> Signed:
    """Sign the image at `ref`; `expected` is the digest that it must have, `node` this one's name (the host's).

    Raises NotFoundError, ImageError, RegistryError, ConflictError.
    """
    store = stores.open_store(ref, registry_options)
    found = stores.resolve(store, expected or stores.source_name(ref, store))
    subjects = [Descriptor(found.top.media_type, found.top.digest, len(found.top.data))]
    if found.index is not None:
        inner = found.manifest_bytes
        subjects.append(Descriptor(found.manifest_type, found.manifest_digest, len(inner)))
    name = f"{ref.host}/{ref.repository}" if isinstance(ref, RegistryRef) else str(ref).partition("@")[0]
    with store.session():
        for subject in subjects:
            _add_simple(store, subject.digest, envelope.simple(name, subject.digest), key)
            if not _has_bundle(store, subject.digest, key):
                signature = envelope.bundle(key, envelope.SIGN_PREDICATE, {}, subject.digest)
                _attach(store, subject, signature, envelope.SIGN_PREDICATE)
            if with_provenance:
                noted = {**(found.index.annotations if found.index else {}), **found.manifest.annotations}
                claim = provenance.predicate(noted, subject.digest, node)
                stated = envelope.bundle(key, provenance.PREDICATE, claim, subject.digest)
                _attach(store, subject, stated, provenance.PREDICATE)
    return Signed(
        str(ref), found.top.digest, tuple(s.digest for s in subjects), key.public.id, with_provenance
    )


def _attach(store: blob.Store, subject: Descriptor, bundle: bytes, predicate: str) -> None:
    noted = {
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": predicate,
        "org.opencontainers.image.created": rfc3339(datetime.now(UTC)),
    }
    referrers.attach(store, envelope.BUNDLE, subject, bundle, noted)


def _has_bundle(store: blob.Store, digest: str, key: SigningKey) -> bool:
    """Whether `key` has signed `digest` in a bundle already."""
    for entry in referrers.listed(store, digest):
        try:
            image = Manifest.parse(store.get_manifest(entry.digest).data)
            known = envelope.parse_bundle(blob.read_small(store, image.layers[0], envelope.MAX_DOCUMENT))
            statement = known.statement()
        except (ImageError, NotFoundError):
            continue
        mine = (
            any(key.public.verifies(made, known.signed.message) for made in known.signatures)
            and digest in statement.digests
        )
        if mine and statement.predicate_type == envelope.SIGN_PREDICATE:
            return True
    return False


def _add_simple(store: blob.Store, digest: str, payload: bytes, key: SigningKey) -> None:
    """Add a signature to those in the .sig manifest of `digest`; one of the same key is kept as it is."""
    tag = referrers.tag(digest, ".sig")
    try:
        known = list(Manifest.parse(store.get_manifest(tag).data).layers)
    except NotFoundError:
        known = []
    for layer in known:
        if layer.digest == digest_of(payload) and key.public.verifies(_signature(layer), payload):
            return
    if len(known) >= MAX_SIGNATURES:
        raise ImageError(
            f"{digest} has {len(known)} signatures; no more are taken", hint=f"remove tag {tag}"
        )
    signature = base64.b64encode(key.sign(payload)).decode()
    new = Descriptor(envelope.SIMPLE, digest_of(payload), len(payload), {envelope.SIGNATURE: signature})
    config = _config([*known, new])
    store.put_blob(blob.Bytes(payload), new, lambda n: None)
    described = Descriptor(CONFIG, digest_of(config), len(config))
    store.put_blob(blob.Bytes(config), described, lambda n: None)
    store.put_manifest(Manifest(described, [*known, new]).to_bytes(), MANIFEST, tag)


def _config(layers: list[Descriptor]) -> bytes:
    ids = ",".join(f'"{layer.digest}"' for layer in layers)
    return (
        '{"architecture":"","created":"0001-01-01T00:00:00Z","os":"",'
        f'"rootfs":{{"type":"layers","diff_ids":[{ids}]}},"config":{{}}}}'
    ).encode()


def _signature(layer: Descriptor) -> bytes:
    try:
        return base64.b64decode(layer.annotations.get(envelope.SIGNATURE, ""), validate=True)
    except ValueError:
        return b""
