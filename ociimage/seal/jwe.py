# SPDX-License-Identifier: Apache-2.0
"""JWE for RSA recipients (RFC 7516, JSON serialization): RSA-OAEP and A256GCM, which is what ocicrypt writes."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cryoci.errors import ImageError
from cryoci.ociimage import strictjson

MAX_DOCUMENT = 1 << 20  # bytes
MAX_RECIPIENTS = 64
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)


def encrypt(content: bytes, recipients: Sequence[RSAPublicKey]) -> bytes:
    """`content` as a JWE for all `recipients`."""
    key, iv = os.urandom(32), os.urandom(12)
    protected = _encode(b'{"enc":"A256GCM"}')
    sealed = AESGCM(key).encrypt(iv, content, protected.encode())
    value = {
        "protected": protected,
        "recipients": [
            {"header": {"alg": "RSA-OAEP"}, "encrypted_key": _encode(public.encrypt(key, _OAEP))}
            for public in recipients
        ],
        "iv": _encode(iv),
        "ciphertext": _encode(sealed[:-16]),
        "tag": _encode(sealed[-16:]),
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decrypt(data: bytes, identities: Sequence[RSAPrivateKey]) -> bytes | None:
    """The content of a JWE; None when none of `identities` opens it. Raises ImageError."""
    value = strictjson.load_object(data, "wrapped key", limit=MAX_DOCUMENT)
    try:
        protected = str(value["protected"])
        header: dict[str, Any] = json.loads(_decode(protected))
        # with one recipient, go-jose flattens the document and protects all of its header
        listed = value.get("recipients") or [value]
        keys = [_decode(r["encrypted_key"]) for r in listed[:MAX_RECIPIENTS]]
        iv, sealed = _decode(value["iv"]), _decode(value["ciphertext"]) + _decode(value["tag"])
    except (KeyError, TypeError, ValueError) as e:
        raise ImageError("the wrapped key of an encrypted image is no JWE") from e
    if header.get("enc") != "A256GCM" or header.get("alg", "RSA-OAEP") != "RSA-OAEP":
        raise ImageError("the key of an encrypted image is wrapped in a way that is not known")
    for wrapped in keys:
        for identity in identities:
            try:
                key = identity.decrypt(wrapped, _OAEP)
                return AESGCM(key).decrypt(iv, sealed, protected.encode())
            except (ValueError, InvalidTag):
                continue
    return None


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
