# SPDX-License-Identifier: Apache-2.0
"""Whose word counts on certificates and times: authorities and transparency logs, as a policy names them.

As PEM (certificates, and public keys of logs), or as sigstore's trusted root (`cosign trusted-root create`; sigstore
protobuf-specs sigstore_trustroot.proto).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cryoci.errors import ConfigError, ImageError, NotFoundError
from cryoci.ociimage import strictjson
from cryoci.ociimage.trust.keys import PublicKey, read_file

_PEM = re.compile(rb"-----BEGIN (CERTIFICATE|PUBLIC KEY)-----.+?-----END \1-----", re.DOTALL)
_TRUSTED_ROOT = "application/vnd.dev.sigstore.trustedroot"
_HINT = "give PEM, or a trusted root in JSON (cosign trusted-root create)"
_ALWAYS = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


@dataclass(frozen=True)
class Trusted:
    """A certificate or a log's key, and from when to when it counts."""

    start: datetime
    end: datetime
    certificate: x509.Certificate | None = None
    key: PublicKey | None = None

    def counts(self, when: datetime) -> bool:
        """Whether it counted then."""
        return self.start <= when <= self.end


@dataclass(frozen=True)
class Roots:
    """The authorities whose certificates count, and the logs, by the sha256 of their keys."""

    authorities: tuple[Trusted, ...]
    logs: Mapping[bytes, Trusted]


def load(files: Iterable[Path]) -> Roots:
    """Read what a policy trusts. Raises PrivilegeError, ConfigError."""
    authorities: list[Trusted] = []
    logs: dict[bytes, Trusted] = {}
    for path in files:
        try:
            data = read_file(path)
        except NotFoundError as e:
            raise ConfigError(f"no root of trust at {path}", hint=_HINT) from e
        try:
            found = _from_json(data, path) if data.lstrip()[:1] == b"{" else _from_pem(data)
        except (ValueError, TypeError, KeyError, AttributeError, ImageError) as e:
            raise ConfigError(f"{path} cannot be read as a root of trust: {e}", hint=_HINT) from e
        for one in found:
            if one.certificate is not None:
                authorities.append(one)
            elif one.key is not None:
                logs[base64.b64decode(one.key.id)] = one
        if not found:
            raise ConfigError(f"{path} holds no certificate and no key of a log", hint=_HINT)
    return Roots(tuple(authorities), logs)


def _from_pem(data: bytes) -> list[Trusted]:
    found = []
    for match in _PEM.finditer(data):
        if match[1] == b"CERTIFICATE":
            found.append(Trusted(*_ALWAYS, certificate=x509.load_pem_x509_certificate(match[0])))
        else:
            found.append(Trusted(*_ALWAYS, key=_log_key(serialization.load_pem_public_key(match[0]))))
    return found


def _from_json(data: bytes, path: Path) -> list[Trusted]:
    value = strictjson.load_object(data, str(path), limit=len(data))
    if not str(value.get("mediaType")).startswith(_TRUSTED_ROOT):
        raise ValueError(f"it is of type {str(value.get('mediaType'))[:100]!r}")
    found = []
    for authority in value.get("certificateAuthorities") or ():
        for one in authority["certChain"]["certificates"]:
            certificate = x509.load_der_x509_certificate(binary(one["rawBytes"]))
            found.append(Trusted(*_span(authority.get("validFor")), certificate=certificate))
    for log in value.get("tlogs") or ():
        key = log["publicKey"]
        if key.get("keyDetails") == "PKIX_ECDSA_P256_SHA_256":  # others promise nothing
            loaded = _log_key(serialization.load_der_public_key(binary(key["rawBytes"])))
            found.append(Trusted(*_span(key.get("validFor")), key=loaded))
    return found


def _span(value: Mapping[str, str] | None) -> tuple[datetime, datetime]:
    start, end = ((value or {}).get(name) for name in ("start", "end"))
    return (
        datetime.fromisoformat(start.replace("Z", "+00:00")) if start else _ALWAYS[0],
        datetime.fromisoformat(end.replace("Z", "+00:00")) if end else _ALWAYS[1],
    )


def _log_key(key: object) -> PublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the key of a log is not ECDSA P-256")
    return PublicKey(key, "log")


def binary(text: str) -> bytes:
    """Base64 without a stray character. Raises ValueError."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as e:
        raise ValueError(f"no base64: {e}") from e
