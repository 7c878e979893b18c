# SPDX-License-Identifier: Apache-2.0
"""Wrapped keys: against the real age and openssl, and against everything that is not one."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cryoci.errors import ConflictError, CryociError, ImageError, UsageError
from cryoci.ociimage.seal import age, bech32, jwe
from tests.unit.images import program

SECRET = bytes(range(32))


def test_age_opens_what_we_wrap(tmp_path: Path) -> None:
    public = age.generate(tmp_path / "id")
    assert stat.S_IMODE((tmp_path / "id").stat().st_mode) == 0o600
    others = [X25519PrivateKey.generate().public_key() for _ in range(3)]
    data = age.encrypt(SECRET, [*others, age.parse_recipient(public)])
    words = [program("age"), "-d", "-i", str(tmp_path / "id")]
    assert subprocess.run(words, input=data, capture_output=True, check=True).stdout == SECRET
    with pytest.raises(ConflictError):
        age.generate(tmp_path / "id")


def test_we_open_what_age_wraps(tmp_path: Path) -> None:
    subprocess.run([program("age-keygen"), "-o", tmp_path / "id"], check=True, capture_output=True)
    lines = (tmp_path / "id").read_text().splitlines()
    public = next(line.split(": ")[1] for line in lines if "public key" in line)
    identity = age.parse_identity(lines[-1])
    assert age.recipient(identity) == public
    words = [program("age"), "-r", age.recipient(X25519PrivateKey.generate()), "-r", public]
    data = subprocess.run(words, input=SECRET, capture_output=True, check=True).stdout
    assert age.decrypt(data, [X25519PrivateKey.generate(), identity]) == SECRET
    assert age.decrypt(data, [X25519PrivateKey.generate()]) is None and age.decrypt(data, []) is None


def test_every_altered_byte_of_a_wrapped_key_is_noticed() -> None:
    identity = X25519PrivateKey.generate()
    data = age.encrypt(SECRET, [identity.public_key()])
    for i in range(len(data)):
        altered = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        try:
            assert age.decrypt(altered, [identity]) is None
        except ImageError:
            continue
    for length in range(len(data)):
        with pytest.raises(ImageError):
            age.decrypt(data[:length], [identity])


def test_bech32() -> None:
    for data in (bytes(32), SECRET, b"\xff" * 32):
        text = bech32.encode("age", data)
        assert bech32.decode("age", text) == bech32.decode("age", text.upper()) == data
        for i in range(4, len(text)):
            with pytest.raises(ValueError):
                bech32.decode("age", text[:i] + ("q" if text[i] != "q" else "p") + text[i + 1 :])
    for text in ("", "age1", "age1x", "AGE1" + "q" * 58, "aGe1" + "q" * 58, "age1" + "b" * 58):
        with pytest.raises(ValueError):
            bech32.decode("age", text)
    with pytest.raises(UsageError):
        age.parse_recipient("age1nonsense")


@pytest.fixture(scope="module")
def pair() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def test_jwe(pair: rsa.RSAPrivateKey) -> None:
    other = rsa.generate_private_key(65537, 2048)
    data = jwe.encrypt(SECRET, [other.public_key(), pair.public_key()])
    assert jwe.decrypt(data, [pair]) == jwe.decrypt(data, [other]) == SECRET
    assert jwe.decrypt(data, [rsa.generate_private_key(65537, 2048)]) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"protected":"e30"}', '{"protected":1,"recipients":[{}]}']
)
def test_what_is_no_jwe(pair: rsa.RSAPrivateKey, text: str) -> None:
    with pytest.raises(CryociError):
        jwe.decrypt(text.encode(), [pair])
