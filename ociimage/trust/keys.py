# SPDX-License-Identifier: Apache-2.0
"""Signing keys: ECDSA P-256 pairs in the files that cosign reads and writes.

A private key is a PEM block around JSON: the PKCS#8 key in NaCl's secretbox, under a key that scrypt makes of the
password (cosign pkg/cosign/keys.go). PKCS#8 as openssl writes it is read too. Public keys are plain PEM.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from cryoci import files
from cryoci.errors import ConfigError, ConflictError, ImageError, NotFoundError, PrivilegeError
from cryoci.ociimage import strictjson
from cryoci.ociimage.trust import secretbox

MAX_FILE = 64 << 10  # bytes of a key file
_LABELS = ("ENCRYPTED SIGSTORE PRIVATE KEY", "ENCRYPTED COSIGN PRIVATE KEY")
_SCRYPT = {"N": 65536, "r": 8, "p": 1}  # what cosign 2 and 3 write
_MAX_SCRYPT_MEMORY = 1 << 30  # bytes (128 * N * r); a key file must not take all of a node's


@dataclass(frozen=True)
class PublicKey:
    """A key that verifies; `id` is the base64 sha256 of its DER, which bundles carry as a hint."""

    key: ec.EllipticCurvePublicKey
    source: str

    @property
    def id(self) -> str:
        """Base64 of the sha256 of the SubjectPublicKeyInfo."""
        der = self.key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return base64.b64encode(hashlib.sha256(der).digest()).decode()

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` (DER) over `data` was made by the private half."""
        try:
            self.key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """A key that signs."""

    key: ec.EllipticCurvePrivateKey

    @property
    def public(self) -> PublicKey:
        """The half that verifies."""
        return PublicKey(self.key.public_key(), "the signing key")

    def sign(self, data: bytes) -> bytes:
        """An ECDSA signature over sha256 of `data`, DER."""
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))


def generate(prefix: Path, password: bytes) -> PublicKey:
    """Make PREFIX.key (0600) and PREFIX.pub (0644). Raises ConflictError when one exists."""
    secret, public = prefix.with_name(prefix.name + ".key"), prefix.with_name(prefix.name + ".pub")
    for path in (secret, public):
        if os.path.lexists(path):
            raise ConflictError(
                f"{path} exists", hint="name another prefix; a lost key cannot be made again"
            )
    key = ec.generate_private_key(ec.SECP256R1())
    files.write_atomic(secret, encrypt(key, password), mode=0o600)
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    files.write_atomic(public, pem, mode=0o644)
    return PublicKey(key.public_key(), str(public))


def encrypt(key: ec.EllipticCurvePrivateKey, password: bytes) -> bytes:
    """The private key file of `key`, as cosign writes it."""
    der = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    salt, nonce = os.urandom(32), os.urandom(secretbox.NONCE)
    box = secretbox.seal(der, nonce, _derive(password, salt, **_SCRYPT))
    value = {
        "kdf": {"name": "scrypt", "params": _SCRYPT, "salt": base64.b64encode(salt).decode()},
        "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
        "ciphertext": base64.b64encode(box).decode(),
    }
    body = base64.b64encode(json.dumps(value, separators=(",", ":")).encode()).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    return "\n".join([f"-----BEGIN {_LABELS[0]}-----", *lines, f"-----END {_LABELS[0]}-----", ""]).encode()


def load_private(path: Path, password: Callable[[], bytes]) -> SigningKey:
    """Read a private key; `password` is called only when the file needs one.

    Raises NotFoundError, PrivilegeError, ConfigError for a file that is no such key or a wrong password.
    """
    data = read_file(path)
    key: object
    try:
        if any(label.encode() in data for label in _LABELS):
            key = serialization.load_der_private_key(_decrypt(data, password(), path), None)
        elif b"ENCRYPTED PRIVATE KEY" in data:
            key = serialization.load_pem_private_key(data, password())
        else:
            key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        wrong = "wrong password, or" if b"ENCRYPTED" in data else "it is"
        raise ConfigError(
            f"cannot read the signing key {path}: {wrong} no private key in PEM", hint=_HINT
        ) from e
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path} is no ECDSA P-256 key", hint=_HINT)
    return SigningKey(key)


def load_public(path: Path) -> PublicKey:
    """Read a public key. Raises NotFoundError, PrivilegeError, ConfigError."""
    data = read_file(path)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{path} is no public key in PEM", hint="name the .pub file of the pair") from e
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path} is no ECDSA P-256 key", hint=_HINT)
    return PublicKey(key, str(path))


_HINT = "make a pair with `cryoci keygen PREFIX` or `cosign generate-key-pair`"


def read_file(path: Path) -> bytes:
    """A key file's bytes. Raises NotFoundError, PrivilegeError, ConfigError when it is too large."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError as e:
        raise NotFoundError(f"no key at {path}", hint=_HINT) from e
    except PermissionError as e:
        raise PrivilegeError(f"cannot read the key {path}", hint="run as its owner, or as root") from e
    except IsADirectoryError as e:
        raise ConfigError(f"{path} is a directory, not a key") from e
    if len(data) > MAX_FILE:
        raise ConfigError(f"{path} is over {MAX_FILE} bytes, and no key")
    return data


def _decrypt(data: bytes, password: bytes, path: Path) -> bytes:
    lines = [line for line in data.decode("ascii", "replace").splitlines() if line and "-----" not in line]
    try:
        raw = base64.b64decode("".join(lines), validate=True)
        value = strictjson.load_object(raw, str(path), limit=MAX_FILE)
        kdf, cipher = value["kdf"], value["cipher"]
        if kdf["name"] != "scrypt" or cipher["name"] != "nacl/secretbox":
            raise ConfigError(
                f"{path} is encrypted with {kdf['name']} and {cipher['name']}, which is not known"
            )
        params = {name: int(kdf["params"][name]) for name in _SCRYPT}
        salt, nonce, box = (base64.b64decode(x) for x in (kdf["salt"], cipher["nonce"], value["ciphertext"]))
        derived = _derive(password, salt, **params)
    except (KeyError, TypeError, ValueError, binascii.Error, ImageError) as e:
        raise ConfigError(f"the signing key {path} is damaged: {e}", hint=_HINT) from e
    der = secretbox.unseal(box, nonce, derived)
    if der is None:
        raise ConfigError(
            f"wrong password for the signing key {path}",
            hint="set COSIGN_PASSWORD, name a --password-file, or type it when asked",
        )
    return der


def _derive(password: bytes, salt: bytes, *, N: int, r: int, p: int) -> bytes:
    if not 1 <= r <= 64 or not 1 <= p <= 16 or N < 2 or 128 * N * r > _MAX_SCRYPT_MEMORY:
        raise ValueError(f"scrypt parameters N={N} r={r} p={p} are out of bounds")
    return Scrypt(salt=salt, length=secretbox.KEY, n=N, r=r, p=p).derive(password)
