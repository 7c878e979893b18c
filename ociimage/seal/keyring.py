# SPDX-License-Identifier: Apache-2.0
"""Who may open an image: recipients on the way in, identities on the way out, wrapped keys in between.

Annotations are ocicrypt's, on every layer: `enc.keys.provider.age` and `enc.keys.jwe` hold the image's key, wrapped
once per recipient, and `enc.pubopts` names the cipher. That is cryoci's own (see stream.py), so other tools refuse
such a layer by name instead of taking it for something else.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shlex
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cryoci.command import run
from cryoci.errors import ConfigError, ImageError, ToolError, TrustError, UsageError
from cryoci.ociimage import strictjson
from cryoci.ociimage.seal import age, jwe, stream
from cryoci.ociimage.trust.keys import MAX_FILE, read_file

_PREFIX = "org.opencontainers.image.enc."
AGE_KEYS = _PREFIX + "keys.provider.age"
JWE_KEYS = _PREFIX + "keys.jwe"
PUBLIC_OPTIONS = _PREFIX + "pubopts"
MIN_RSA = 2048  # bits
_HINT = "an age recipient (age1...), or a file with such lines or an RSA public key in PEM"


@dataclass(frozen=True)
class Recipients:
    """Public keys; the holder of any one private half opens the image."""

    age: tuple[X25519PublicKey, ...] = ()
    rsa: tuple[RSAPublicKey, ...] = ()

    @staticmethod
    def parse(words: Sequence[str]) -> Recipients:
        """Read `age1...`, or names of files with recipients. Raises UsageError, ConfigError, NotFoundError."""
        ages: list[X25519PublicKey] = []
        rsas: list[RSAPublicKey] = []
        for word in words:
            if word.lower().startswith("age1") and not os.path.exists(word):
                ages.append(age.parse_recipient(word))
                continue
            data = read_file(Path(word.removeprefix("jwe:")))
            if b"-----BEGIN" in data:
                rsas.append(_rsa_public(data, word))
                continue
            lines = _lines(data.decode(errors="replace"))
            ages += [age.parse_recipient(line) for line in lines]
            if not lines:
                raise ConfigError(f"{word} names no recipient", hint=_HINT)
        return Recipients(tuple(ages), tuple(rsas))

    def __bool__(self) -> bool:
        return bool(self.age or self.rsa)

    def wrap(self, image_key: bytes) -> dict[str, str]:
        """The annotations of each layer of an image with this key."""
        secret = json.dumps({"symkey": base64.b64encode(image_key).decode()}).encode()
        noted = {PUBLIC_OPTIONS: _encode(json.dumps({"cipher": stream.CIPHER}).encode())}
        if self.age:
            noted[AGE_KEYS] = _encode(age.encrypt(secret, self.age))
        if self.rsa:
            noted[JWE_KEYS] = _encode(jwe.encrypt(secret, self.rsa))
        return noted


@dataclass(frozen=True)
class Identities:
    """Private keys; they stay out of `repr`."""

    age: tuple[X25519PrivateKey, ...] = field(default=(), repr=False)
    rsa: tuple[RSAPrivateKey, ...] = field(default=(), repr=False)

    @staticmethod
    def load(files: Sequence[Path], command: str | None = None) -> Identities:
        """Read identity files (`-` is stdin), and what `command` prints.

        Raises NotFoundError, PrivilegeError, ConfigError also for a file that others may read, ToolError.
        """
        ages: list[X25519PrivateKey] = []
        rsas: list[RSAPrivateKey] = []
        sources = [(_private(path), str(path)) for path in files]
        if command is not None:
            sources.append((_printed(command), f"what {shlex.split(command)[0]} printed"))
        for data, name in sources:
            if b"-----BEGIN" in data:
                rsas.append(_rsa_private(data, name))
                continue
            try:
                lines = _lines(data.decode("ascii"))
                ages += [age.parse_identity(line) for line in lines]
            except (ValueError, UnicodeError) as e:
                # never with the text: it is a secret, or nearly one
                raise ConfigError(
                    f"{name} holds no age identity and no RSA key in PEM", hint=_KEY_HINT
                ) from e
            if not lines:
                raise ConfigError(f"{name} holds no key", hint=_KEY_HINT)
        return Identities(tuple(ages), tuple(rsas))

    def __bool__(self) -> bool:
        return bool(self.age or self.rsa)

    def opens(self, recipients: Recipients) -> bool:
        """Whether one of these keys opens what is encrypted to `recipients`."""
        try:
            self.unwrap(recipients.wrap(os.urandom(stream.KEY)))
        except TrustError:
            return False
        return True

    def unwrap(self, annotations: Mapping[str, str]) -> bytes:
        """The image's key from a layer's annotations. Raises TrustError for no key or wrong ones, ImageError."""
        _check_cipher(annotations)
        secret = None
        if self.age and (text := annotations.get(AGE_KEYS)):
            secret = age.decrypt(_decode(text), self.age)
        if secret is None and self.rsa and (text := annotations.get(JWE_KEYS)):
            secret = jwe.decrypt(_decode(text), self.rsa)
        if secret is None:
            kinds = [name for name, key in (("age", AGE_KEYS), ("RSA", JWE_KEYS)) if key in annotations]
            known = f"it is encrypted to {' and '.join(kinds) or 'nobody'} keys"
            if not self:
                raise TrustError(f"the image is encrypted, and no key was given ({known})", hint=_GIVE)
            raise TrustError(f"none of the given keys opens the image ({known})", hint=_GIVE)
        try:
            key = base64.b64decode(
                strictjson.load_object(secret, "image key", limit=4096)["symkey"], validate=True
            )
        except (KeyError, TypeError, ValueError) as e:
            raise ImageError("the wrapped key of an encrypted image holds none") from e
        if len(key) != stream.KEY:
            raise ImageError("the wrapped key of an encrypted image has another length")
        return key


_GIVE = "give --decrypt-key FILE of one of those for whom it was encrypted, or put that file into /etc/cryoci/decrypt"
_KEY_HINT = "`cryoci keygen --seal FILE` or age-keygen makes one"


def _check_cipher(annotations: Mapping[str, str]) -> None:
    try:
        options = strictjson.load_object(_decode(annotations[PUBLIC_OPTIONS]), "pubopts", limit=64 << 10)
        cipher = str(options["cipher"])
    except KeyError as e:
        raise ImageError("an encrypted layer does not say how it is encrypted") from e
    if cipher != stream.CIPHER:
        raise ImageError(
            f"the image is encrypted with {cipher[:60]}, which cryoci does not read",
            hint="ocicrypt's own: skopeo copy --decryption-key KEY SOURCE TARGET, then pull TARGET",
        )


def _private(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(MAX_FILE)
    data = read_file(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"others may read the key {path}", hint=f"chmod 600 {path}")
    return data


def _printed(command: str) -> bytes:
    words = shlex.split(command)
    if not words:
        raise UsageError("the command that prints the key is empty")
    done = run(words, check=False, timeout=120)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-500:]  # never stdout: it may hold the key
        raise ToolError(
            f"command failed with status {done.returncode}: {said}\n  command: {shlex.join(words)}"
        )
    return done.stdout[:MAX_FILE]


def _lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def _rsa_public(data: bytes, name: str) -> RSAPublicKey:
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{name} is no public key in PEM", hint=_HINT) from e
    if not isinstance(key, RSAPublicKey) or key.key_size < MIN_RSA:
        raise ConfigError(f"{name} is no RSA key of {MIN_RSA} bits or more", hint=_HINT)
    return key


def _rsa_private(data: bytes, name: str) -> RSAPrivateKey:
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(
            f"{name} is no private key in PEM without a password",
            hint="have --decrypt-command print it: 'openssl pkey -in KEY'",
        ) from e
    if not isinstance(key, RSAPrivateKey):
        raise ConfigError(f"{name} is no RSA key", hint=_KEY_HINT)
    return key


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as e:
        raise ImageError("an annotation of an encrypted layer is not base64") from e
