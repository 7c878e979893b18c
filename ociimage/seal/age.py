# SPDX-License-Identifier: Apache-2.0
"""age v1 files with X25519 recipients: how an image's key reaches those who may open it.

C2SP age.md. Only small files are handled (one chunk of payload), which is what a key is; the `age` program opens
what is made here, and the other way round. Keys are in age's own files: AGE-SECRET-KEY-1... and age1...
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cryoci import files
from cryoci.errors import ConflictError, ImageError, UsageError
from cryoci.ociimage.seal import bech32

MAX_CONTENT = 64 << 10  # bytes: one chunk of age's payload
MAX_STANZAS = 256
_INTRO = b"age-encryption.org/v1\n"
_X25519 = b"age-encryption.org/v1/X25519"
_RECIPIENT, _IDENTITY = "age", "age-secret-key-"


def generate(path: Path) -> str:
    """Make an identity file (0600), as age-keygen does, and its directory (0700); returns its recipient.

    Raises ConflictError.
    """
    if os.path.lexists(path):
        raise ConflictError(f"{path} exists", hint="name another file; a lost key cannot be made again")
    key = X25519PrivateKey.generate()
    public = recipient(key)
    secret = bech32.encode(_IDENTITY, key.private_bytes_raw()).upper()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.write_atomic(path, f"# public key: {public}\n{secret}\n", mode=0o600)
    return public


def recipient(key: X25519PrivateKey) -> str:
    """The recipient `age1...` of an identity."""
    return bech32.encode(_RECIPIENT, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def parse_recipient(text: str) -> X25519PublicKey:
    """Read `age1...`. Raises UsageError."""
    try:
        return X25519PublicKey.from_public_bytes(bech32.decode(_RECIPIENT, text))
    except ValueError as e:
        raise UsageError(
            f"not an age recipient: {text[:80]} ({e})", hint="`cryoci keygen --seal FILE`"
        ) from e


def parse_identity(text: str) -> X25519PrivateKey:
    """Read `AGE-SECRET-KEY-1...`. Raises ValueError, which never shows the text."""
    return X25519PrivateKey.from_private_bytes(bech32.decode(_IDENTITY, text))


def encrypt(content: bytes, recipients: Sequence[X25519PublicKey]) -> bytes:
    """`content` (at most MAX_CONTENT bytes) as an age file for all `recipients`."""
    file_key = os.urandom(16)
    header = _INTRO + b"".join(_stanza(file_key, public) for public in recipients) + b"---"
    header += b" " + _encode(_mac(file_key, header)) + b"\n"
    nonce = os.urandom(16)
    payload = ChaCha20Poly1305(_payload_key(file_key, nonce)).encrypt(bytes(11) + b"\1", content, None)
    return header + nonce + payload


def decrypt(data: bytes, identities: Sequence[X25519PrivateKey]) -> bytes | None:
    """The content of an age file; None when none of `identities` opens it. Raises ImageError."""
    stanzas, signed, mac, payload = _parse(data)
    for share, body in stanzas:
        for identity in identities:
            file_key = _unwrap(share, body, identity)
            if file_key is None:
                continue
            if not hmac.compare_digest(_mac(file_key, signed), mac):
                raise ImageError("the wrapped key of an encrypted image was altered")
            try:
                cipher = ChaCha20Poly1305(_payload_key(file_key, payload[:16]))
                return cipher.decrypt(bytes(11) + b"\1", payload[16:], None)
            except InvalidTag as e:
                raise ImageError("the wrapped key of an encrypted image is damaged") from e
    return None


def _stanza(file_key: bytes, public: X25519PublicKey) -> bytes:
    ephemeral = X25519PrivateKey.generate()
    share = ephemeral.public_key().public_bytes_raw()
    wrap = _wrap_key(ephemeral.exchange(public), share, public.public_bytes_raw())
    body = ChaCha20Poly1305(wrap).encrypt(bytes(12), file_key, None)
    return b"-> X25519 " + _encode(share) + b"\n" + _encode(body) + b"\n"


def _unwrap(share: bytes, body: bytes, identity: X25519PrivateKey) -> bytes | None:
    try:
        secret = identity.exchange(X25519PublicKey.from_public_bytes(share))
        wrap = _wrap_key(secret, share, identity.public_key().public_bytes_raw())
        return ChaCha20Poly1305(wrap).decrypt(bytes(12), body, None)
    except (InvalidTag, ValueError):  # not for this identity, or a point of low order
        return None


def _parse(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes, bytes, bytes]:
    """The X25519 stanzas, the header that the MAC covers, the MAC, the payload."""
    head, end, rest = data.partition(b"\n--- ")
    line, newline, payload = rest.partition(b"\n")
    if not data.startswith(_INTRO) or not end or not newline or not 32 <= len(payload) <= 32 + MAX_CONTENT:
        raise ImageError("the wrapped key of an encrypted image is no age file")
    stanzas: list[tuple[list[bytes], bytes]] = []
    for text in head[len(_INTRO) :].split(b"\n"):
        if text.startswith(b"-> "):
            stanzas.append((text.split(b" ")[1:], b""))
        elif stanzas:
            stanzas[-1] = (stanzas[-1][0], stanzas[-1][1] + text)
    if len(stanzas) > MAX_STANZAS:
        raise ImageError("an encrypted image has too many recipients")
    try:
        known = [
            (_decode(words[1]), _decode(body))
            for words, body in stanzas
            if words[0] == b"X25519" and words[1:]
        ]
        mac = _decode(line)
    except ValueError as e:
        raise ImageError("the wrapped key of an encrypted image is damaged") from e
    # age: exactly a 16 byte key and its tag, else a body of two keys could open for two recipients differently
    return (
        [(share, body) for share, body in known if len(share) == 32 and len(body) == 32],
        head + b"\n---",
        mac,
        payload,
    )


def _wrap_key(secret: bytes, share: bytes, public: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, share + public, _X25519).derive(secret)


def _payload_key(file_key: bytes, nonce: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, nonce, b"payload").derive(file_key)


def _mac(file_key: bytes, header: bytes) -> bytes:
    return hmac.new(
        HKDF(hashes.SHA256(), 32, None, b"header").derive(file_key), header, hashlib.sha256
    ).digest()


def _encode(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    """Raises ValueError, also for spare bits that are not zero (age's specification: canonical base64)."""
    data = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    if _encode(data) != text:
        raise ValueError("not canonical base64")
    return data
