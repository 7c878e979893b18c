# SPDX-License-Identifier: Apache-2.0
"""Signed documents: cosign's simple-signing payload, in-toto statements in DSSE, and sigstore bundles around them.

Sources: cosign specs/SIGNATURE_SPEC.md and BUNDLE_SPEC.md, secure-systems-lab/dsse protocol.md, in-toto
attestation spec v1, sigstore protobuf-specs sigstore_bundle.proto (as JSON).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryoci.errors import ImageError
from cryoci.ociimage import strictjson
from cryoci.ociimage.trust.identity import Material, Signed, material
from cryoci.ociimage.trust.keys import SigningKey

SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIMPLE_TYPE = "cosign container image signature"
SIGNATURE = "dev.cosignproject.cosign/signature"  # annotation of a simple-signing layer
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
STATEMENTS = ("https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1")
SIGN_PREDICATE = "https://sigstore.dev/cosign/sign/v1"  # what cosign 3 states when it signs an image
MAX_DOCUMENT = 1 << 20  # bytes of a payload or bundle


@dataclass(frozen=True)
class Statement:
    """An in-toto statement: `predicate` is claimed of the sha256 `digests`."""

    predicate_type: str
    predicate: Mapping[str, Any]
    digests: frozenset[str]


@dataclass(frozen=True)
class Envelope:
    """A payload with its signatures, verified by nobody yet; `material` is what a signer without a key brings."""

    payload_type: str
    payload: bytes
    signatures: tuple[bytes, ...]
    material: Material | None = None

    @property
    def signed(self) -> Signed:
        """What the signatures are of."""
        return Signed(authenticated(self.payload_type, self.payload), self.payload, self.signatures)

    def statement(self) -> Statement:
        """The in-toto statement inside. Raises ImageError."""
        if self.payload_type != IN_TOTO:
            raise ImageError(f"the bundle holds {self.payload_type[:100]!r}, no in-toto statement")
        value = strictjson.load_object(self.payload, "statement", limit=MAX_DOCUMENT)
        subjects, predicate = value.get("subject"), value.get("predicate")
        if value.get("_type") not in STATEMENTS or not isinstance(subjects, list):
            raise ImageError("the statement in a bundle is no in-toto statement of version 1 or 0.1")
        digests = frozenset(
            f"sha256:{subject['digest']['sha256']}"
            for subject in subjects
            if isinstance(subject, dict)
            and isinstance(subject.get("digest"), dict)
            and isinstance(subject["digest"].get("sha256"), str)
        )
        return Statement(
            str(value.get("predicateType")), predicate if isinstance(predicate, dict) else {}, digests
        )


def simple(reference: str, digest: str) -> bytes:
    """The payload of a simple signature, byte for byte as cosign writes it; `reference` is HOST/REPOSITORY."""
    return _json(
        {
            "critical": {
                "identity": {"docker-reference": reference},
                "image": {"docker-manifest-digest": digest},
                "type": SIMPLE_TYPE,
            },
            "optional": None,
        }
    )


def simple_digest(payload: bytes) -> str:
    """The digest that a simple-signing payload vouches for. Raises ImageError."""
    value = strictjson.load_object(payload, "signature payload", limit=MAX_DOCUMENT)
    critical = value.get("critical")
    image = critical.get("image") if isinstance(critical, dict) else None
    # cosign's type and that of older containers/image; anything else is a statement about something else
    if not isinstance(critical, dict) or critical.get("type") not in (
        SIMPLE_TYPE,
        "atomic container signature",
    ):
        raise ImageError("a signature's payload is not about a container image")
    if not isinstance(image, dict):
        raise ImageError("a signature's payload names no image")
    return str(image.get("docker-manifest-digest"))


def bundle(key: SigningKey, predicate_type: str, predicate: Mapping[str, Any], digest: str) -> bytes:
    """A sigstore bundle v0.3 around a DSSE-signed in-toto statement about `digest`."""
    statement = _json(
        {
            "_type": STATEMENTS[0],
            "subject": [{"digest": {"sha256": digest.removeprefix("sha256:")}}],
            "predicateType": predicate_type,
            "predicate": predicate,
        }
    )
    signature = key.sign(authenticated(IN_TOTO, statement))
    return _json(
        {
            "mediaType": BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": key.public.id}},
            "dsseEnvelope": {
                "payload": base64.b64encode(statement).decode(),
                "payloadType": IN_TOTO,
                "signatures": [{"sig": base64.b64encode(signature).decode()}],
            },
        }
    )


def parse_bundle(data: bytes) -> Envelope:
    """The DSSE envelope of a sigstore bundle. Raises ImageError."""
    value = strictjson.load_object(data, "sigstore bundle", limit=MAX_DOCUMENT)
    inside, beside = value.get("dsseEnvelope"), value.get("verificationMaterial")
    entries = beside.get("tlogEntries") if isinstance(beside, dict) else None
    if not str(value.get("mediaType")).startswith("application/vnd.dev.sigstore.bundle"):
        raise ImageError("an artifact claims to be a sigstore bundle and is none")
    if not isinstance(inside, dict) or not isinstance(inside.get("signatures"), list):
        raise ImageError("a sigstore bundle has no DSSE envelope")
    try:
        return Envelope(
            str(inside["payloadType"]),
            base64.b64decode(inside["payload"], validate=True),
            tuple(base64.b64decode(entry["sig"], validate=True) for entry in inside["signatures"][:8]),
            material(beside, entries),
        )
    except (KeyError, TypeError, ValueError, binascii.Error) as e:
        raise ImageError(f"a sigstore bundle is damaged: {e}") from e


def authenticated(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type.encode()), payload_type.encode(), len(payload), payload)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
