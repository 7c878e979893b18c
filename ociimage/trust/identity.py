# SPDX-License-Identifier: Apache-2.0
"""Signatures without a key of one's own: a certificate says who had the key for ten minutes, a log when it was used.

Verified with what the policy names (roots.py), without the network. Sources: fulcio docs/oid-info.md, sigstore
protobuf-specs sigstore_bundle.proto, rekor types dsse 0.0.1 and hashedrekord 0.0.1, cosign pkg/cosign/verify.go. Not
asked: certificate transparency (SCT), and timestamp authorities.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from cryoci.errors import ImageError
from cryoci.ociimage import strictjson
from cryoci.ociimage.trust.keys import PublicKey
from cryoci.ociimage.trust.roots import Roots, binary

MAX_ENTRIES = 4  # of logs, in one bundle
MAX_CHAIN = 4  # certificates between a signer's and an authority that the policy names
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")  # a DER UTF8String
_ISSUER_V1 = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # the bare text
_KNOWN = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)


@dataclass(frozen=True)
class Identity:
    """Who may have signed: `subject` is a URI or mail address, * for any part; `issuer` vouched for it by OIDC."""

    subject: str
    issuer: str


@dataclass(frozen=True)
class Entry:
    """What a log says that it took in: `body` is canonical JSON, `promise` its signature over this."""

    log: bytes
    index: int
    time: int
    body: bytes
    promise: bytes


@dataclass(frozen=True)
class Material:
    """What comes with a signature to verify it by, believed by nobody yet: DER certificates, and log entries."""

    certificate: bytes
    chain: tuple[bytes, ...] = ()
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Signed:
    """Signatures over `message`; `content` is what a log has the hash of."""

    message: bytes
    content: bytes
    signatures: tuple[bytes, ...]


@dataclass(frozen=True)
class Keyless:
    """Identities that count, and by whose word."""

    identities: tuple[Identity, ...]
    roots: Roots

    def signer(self, material: Material, signed: Signed) -> str | None:
        """Which of the identities made one of the signatures; None when none is shown to have. Raises ImageError."""
        try:
            leaf = x509.load_der_x509_certificate(material.certificate)
            chain = [x509.load_der_x509_certificate(one) for one in material.chain[:MAX_CHAIN]]
            key = leaf.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
                return None
            own = PublicKey(key, "certificate")
            made = next((s for s in signed.signatures if own.verifies(s, signed.message)), None)
            if made is None or not _may_sign(leaf):
                return None
            when = self._seen(material, leaf, signed, made) or datetime.now(UTC)
            if not _valid(leaf, when) or not self._vouched(leaf, chain, when):
                return None
            return self._named(leaf)
        except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as e:
            raise ImageError(f"the certificate of a signature is damaged: {e}") from e

    def _seen(
        self, material: Material, leaf: x509.Certificate, signed: Signed, made: bytes
    ) -> datetime | None:
        """When a log of the policy's took this signature in, mostly long after which its certificate is verified."""
        for entry in material.entries[:MAX_ENTRIES]:
            log = self.roots.logs.get(entry.log)
            if log is None or log.key is None:
                continue
            stated = json.dumps(
                {
                    "body": base64.b64encode(entry.body).decode(),
                    "integratedTime": entry.time,
                    "logID": entry.log.hex(),
                    "logIndex": entry.index,
                },
                separators=(",", ":"),
                sort_keys=True,
            ).encode()
            when = datetime.fromtimestamp(entry.time, UTC)
            if (
                log.counts(when)
                and log.key.verifies(entry.promise, stated)
                and _is_of(entry, leaf, signed, made)
            ):
                return when
        return None

    def _vouched(self, leaf: x509.Certificate, chain: Sequence[x509.Certificate], when: datetime) -> bool:
        """Whether certificates lead from an authority of the policy's to the leaf."""
        current = leaf
        for depth in range(MAX_CHAIN):
            for authority in self.roots.authorities:
                if authority.counts(when) and _issued(current, authority.certificate, when, depth):
                    return True
            following = next((one for one in chain if _issued(current, one, when, depth)), None)
            if following is None:
                return False
            current = following
        return False

    def _named(self, leaf: x509.Certificate) -> str | None:
        issuer = _issuer(leaf)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        subjects = [
            *names.get_values_for_type(x509.UniformResourceIdentifier),
            *names.get_values_for_type(x509.RFC822Name),
        ]
        for one in self.identities:
            for subject in subjects:
                if one.issuer == issuer and fnmatch.fnmatchcase(subject, _literal(one.subject)):
                    return f"{subject} by {issuer}"
        return None


def material(value: object, entries: object) -> Material | None:
    """The certificate of a bundle's verificationMaterial; None where there is none. Raises ImageError."""
    if not isinstance(value, dict):
        return None
    listed = value.get("x509CertificateChain")
    certificates = [value.get("certificate")]
    if isinstance(listed, dict) and isinstance(listed.get("certificates"), list):
        certificates = listed["certificates"]
    try:
        raw = [binary(one["rawBytes"]) for one in certificates[: MAX_CHAIN + 1] if isinstance(one, dict)]
        noted = entries if isinstance(entries, list) else []
        return Material(raw[0], tuple(raw[1:]), tuple(map(_entry, noted[:MAX_ENTRIES]))) if raw else None
    except (KeyError, TypeError, ValueError) as e:
        raise ImageError(f"the verification material of a bundle is damaged: {e}") from e


def simple_material(noted: Mapping[str, str]) -> Material | None:
    """The same of a simple signature, from the annotations of its layer. Raises ImageError."""
    text = noted.get("dev.sigstore.cosign/certificate", "")
    if not text:
        return None
    try:
        chain = noted.get("dev.sigstore.cosign/chain", "")
        certificates = [
            one.public_bytes(serialization.Encoding.DER)
            for part in (text, chain)
            if part.strip()
            for one in x509.load_pem_x509_certificates(part.encode())
        ]
        entries = []
        if bundle := noted.get("dev.sigstore.cosign/bundle"):
            value = strictjson.load_object(bundle.encode(), "bundle", limit=len(bundle.encode()))
            inside = value["Payload"]
            entries = [
                Entry(
                    bytes.fromhex(inside["logID"]),
                    int(inside["logIndex"]),
                    int(inside["integratedTime"]),
                    binary(inside["body"]),
                    binary(value["SignedEntryTimestamp"]),
                )
            ]
    except (KeyError, TypeError, ValueError) as e:
        raise ImageError(f"the certificate of a signature is damaged: {e}") from e
    return Material(certificates[0], tuple(certificates[1:]), tuple(entries))


def _entry(value: Mapping[str, Any]) -> Entry:
    promise = (
        value.get("inclusionPromise") or {}
    )  # newer logs give none, and their entries vouch for no time here
    return Entry(
        binary(value["logId"]["keyId"]),
        int(value["logIndex"]),
        int(value.get("integratedTime") or 0),
        binary(value["canonicalizedBody"]),
        binary(promise.get("signedEntryTimestamp") or ""),
    )


def _is_of(entry: Entry, leaf: x509.Certificate, signed: Signed, made: bytes) -> bool:
    """Whether a log's entry is about this signature, of this content, by this certificate."""
    digest = hashlib.sha256(signed.content).hexdigest()
    try:
        body = strictjson.load_object(entry.body, "log entry", limit=len(entry.body))
        spec = body["spec"]
        if body["kind"] == "dsse":
            hashed = spec["payloadHash"]
            noted = [(binary(one["signature"]), one["verifier"]) for one in spec["signatures"]]
        elif body["kind"] == "hashedrekord":
            hashed = spec["data"]["hash"]
            noted = [(binary(spec["signature"]["content"]), spec["signature"]["publicKey"]["content"])]
        else:
            return False
        same = any(
            signature == made and x509.load_pem_x509_certificate(binary(verifier)) == leaf
            for signature, verifier in noted
        )
        return same and hashed["algorithm"] == "sha256" and hashed["value"] == digest
    except (ImageError, KeyError, TypeError, ValueError):
        return False


def _may_sign(leaf: x509.Certificate) -> bool:
    if not _understood(leaf) or _constraints(leaf).ca:
        return False
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return ExtendedKeyUsageOID.CODE_SIGNING in usage


def _issued(child: x509.Certificate, parent: x509.Certificate | None, when: datetime, below: int) -> bool:
    """Whether `parent`, with `below` authorities between it and the leaf, made `child`, and may."""
    if (
        parent is None
        or child.issuer != parent.subject
        or not _valid(parent, when)
        or not _understood(parent)
    ):
        return False
    constraints = _constraints(parent)
    if not constraints.ca or (constraints.path_length is not None and below > constraints.path_length):
        return False
    try:
        if not parent.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
            return False
        child.verify_directly_issued_by(parent)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return True


def _constraints(certificate: x509.Certificate) -> x509.BasicConstraints:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return x509.BasicConstraints(ca=False, path_length=None)


def _understood(certificate: x509.Certificate) -> bool:
    return all(not one.critical or one.oid in _KNOWN for one in certificate.extensions)


def _valid(certificate: x509.Certificate, when: datetime) -> bool:
    return certificate.not_valid_before_utc <= when <= certificate.not_valid_after_utc


def _issuer(leaf: x509.Certificate) -> str:
    for oid in (_ISSUER, _ISSUER_V1):
        try:
            value = leaf.extensions.get_extension_for_oid(oid).value
        except x509.ExtensionNotFound:
            continue
        raw = value.value if isinstance(value, x509.UnrecognizedExtension) else b""
        if oid == _ISSUER:
            if raw[:1] != b"\x0c" or len(raw) < 2 or raw[1] != len(raw) - 2 or raw[1] > 127:
                raise ValueError("its issuer is no short UTF8String")
            raw = raw[2:]
        return raw.decode()
    return ""


def _literal(pattern: str) -> str:
    """A pattern in which only * is special: addresses of workflows hold [ and ?."""
    return re.sub(r"[\[?]", lambda match: f"[{match[0]}]", pattern)
