# SPDX-License-Identifier: Apache-2.0
"""Who signed an image: every signature and attestation by a given key or identity, of any cosign's making."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoci.errors import ImageError, NotFoundError, TrustError
from cryoci.ociimage import blob, referrers, strictjson
from cryoci.ociimage.manifest import Manifest
from cryoci.ociimage.trust import envelope, provenance
from cryoci.ociimage.trust.identity import Keyless, Material, Signed, simple_material
from cryoci.ociimage.trust.keys import PublicKey, load_public
from cryoci.ociimage.trust.sign import MAX_SIGNATURES


@dataclass(frozen=True)
class Vouched:
    """One statement about an image that somebody known signed; `kind` is "tag" or "bundle".

    `key` is the file of the key, or the identity in the certificate and who vouched for it.
    """

    kind: str
    key: str
    predicate_type: str
    predicate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_signature(self) -> bool:
        """Whether it says "this image is mine", which an attestation of some other fact does not."""
        return self.predicate_type == envelope.SIGN_PREDICATE

    @property
    def is_provenance(self) -> bool:
        """Whether it says where the image comes from."""
        return self.predicate_type == provenance.PREDICATE


@dataclass(frozen=True)
class Signers:
    """Whose signatures count."""

    keys: Sequence[PublicKey] = ()
    keyless: Keyless | None = None

    def of(self, signed: Signed, material: Material | None) -> str | None:
        """Which of them made one of the signatures. Raises ImageError."""
        for key in self.keys:
            if any(key.verifies(signature, signed.message) for signature in signed.signatures):
                return key.source
        if self.keyless is None or material is None:
            return None
        return self.keyless.signer(material, signed)


@dataclass(frozen=True)
class Findings:
    """What there was: `vouched` by known signers; `others` were signed by unknown ones, or are damaged."""

    digest: str
    vouched: tuple[Vouched, ...]
    others: int

    @property
    def signatures(self) -> tuple[Vouched, ...]:
        """The signatures among `vouched`."""
        return tuple(v for v in self.vouched if v.is_signature)

    @property
    def provenance(self) -> tuple[Vouched, ...]:
        """The statements of provenance among `vouched`."""
        return tuple(v for v in self.vouched if v.is_provenance)


def verify(
    store: blob.Store, digest: str, keys: Sequence[PublicKey], keyless: Keyless | None = None
) -> Findings:
    """Look at all that is attached to `digest`. Raises RegistryError; damaged attachments count as others."""
    vouched: list[Vouched] = []
    others = 0
    signers = Signers(keys, keyless)
    for check in _checks(store, digest):
        try:
            found = check(signers)
        except (ImageError, NotFoundError):
            found = None
        if found is None:
            others += 1
        else:
            vouched.append(found)
    return Findings(digest, tuple(vouched), others)


def require(
    store: blob.Store, digest: str, files: Sequence[Path], keyless: Keyless | None = None
) -> Findings:
    """As `verify`, with the keys in `files`. Raises TrustError when nobody of them and of `keyless` signed."""
    found = verify(store, digest, [load_public(path) for path in files], keyless)
    if not found.signatures:
        seen = f"{found.others} by other keys or damaged" if found.others else "it has none"
        names = [p.name for p in files] + [one.subject for one in (keyless.identities if keyless else ())]
        raise TrustError(f"no signature of {' or '.join(names)} ({seen})")
    return found


_Check = Callable[[Signers], Vouched | None]


def _checks(store: blob.Store, digest: str) -> list[_Check]:
    checks: list[_Check] = []
    try:
        older = Manifest.parse(store.get_manifest(referrers.tag(digest, ".sig")).data)
        for layer in older.layers[:MAX_SIGNATURES]:
            checks.append(lambda known, layer=layer: _simple(store, layer, digest, known))  # type: ignore[misc]
    except (NotFoundError, ImageError):
        pass  # it has none; or somebody wrote rubbish there, which vouches for nothing
    try:
        entries = referrers.listed(store, digest)
    except ImageError:
        return [*checks, lambda known: None]  # rubbish under the tag of the list
    for entry in entries:
        checks.append(lambda known, entry=entry: _bundle(store, entry.digest, digest, known))  # type: ignore[misc]
    return checks


def _simple(store: blob.Store, layer: Any, digest: str, known: Signers) -> Vouched | None:
    payload = blob.read_small(store, layer, envelope.MAX_DOCUMENT)
    try:
        signature = base64.b64decode(layer.annotations.get(envelope.SIGNATURE, ""), validate=True)
    except ValueError:
        return None
    material = simple_material(layer.annotations) if known.keyless is not None else None
    signer = known.of(Signed(payload, payload, (signature,)), material)
    if layer.media_type != envelope.SIMPLE or signer is None or envelope.simple_digest(payload) != digest:
        return None
    return Vouched("tag", signer, envelope.SIGN_PREDICATE)


def _bundle(store: blob.Store, artifact: str, digest: str, known: Signers) -> Vouched | None:
    data = store.get_manifest(artifact).data
    image = Manifest.parse(data)
    value = strictjson.load_object(data, "artifact", limit=len(data))
    layer = image.layers[0]
    # the entry in a list of referrers may say anything (cosign 2 and 3 do); the artifact itself counts
    if envelope.BUNDLE not in (str(value.get("artifactType")), layer.media_type):
        return None
    found = envelope.parse_bundle(blob.read_small(store, layer, envelope.MAX_DOCUMENT))
    signer = known.of(found.signed, found.material)
    if signer is None:
        return None
    statement = found.statement()
    if digest not in statement.digests:
        return None
    return Vouched("bundle", signer, statement.predicate_type, statement.predicate)
