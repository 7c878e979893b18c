# SPDX-License-Identifier: Apache-2.0
"""Key files: ours, cosign's, and those that are neither."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from cryoci.errors import ConfigError, ConflictError, NotFoundError
from cryoci.ociimage.trust import keys, secretbox

# made by cosign 2.5.0 (Debian trixie): COSIGN_PASSWORD=pw cosign generate-key-pair
COSIGN_KEY = """\
-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----
eyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6
OCwicCI6MX0sInNhbHQiOiIvcW96dnVGUFNVdGd6TUlUbDNETXhqODRubHJMNG5u
cHQ2QUVMSTgyd3YwPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94
Iiwibm9uY2UiOiJqblBUdGVaUGdZejVtTm1SRDYyQjNVOWdybG9kaStmMSJ9LCJj
aXBoZXJ0ZXh0IjoiMXpvYVVGdmtGeU40TnZTRHV3d2dMQy8rUWxxeU0yQ2lsbUZs
Q2FwSWFsc201WHZKSnJuS2ZINUZjVm9pTTVuc0pGWEtZZjhsT2dmYlplSDBTVFNL
dGZWNGF2eHdKdFJ2YmZYRkZWRVJQNVA4b0I5MUgzWW4wdER2dDVKWmt3SXU1WWdi
M3pEMUtNNTY5SzRnRzB4MklCZWxOYVAzS2lSeWoxVVZFcnY0WTBpcUtuZEk2K3Nk
U3IvQkYrZS9XSHJqTHU3c0MvRW5sc3piTXc9PSJ9
-----END ENCRYPTED SIGSTORE PRIVATE KEY-----
"""
COSIGN_ID = "ddCOW8qwabnnK05Hjpo3oxnpN/gxf6hTpDEB9gqTCP8="  # the hint in bundles that it signed


def unasked() -> bytes:
    raise AssertionError("no password is needed")


def test_secretbox_agrees_with_nacl() -> None:
    # NaCl's tests/secretbox.c and its output
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    message = bytes.fromhex(
        "be075fc53c81f2d5cf141316ebeb0c7b5228c52a4c62cbd44b66849b64244ffce5ecbaaf33bd751a1ac728d45e6c6129"
        "6cdc3c01233561f41db66cce314adb310e3be8250c46f06dceea3a7fa1348057e2f6556ad6b1318a024a838f21af1fde"
        "048977eb48f59ffd4924ca1c60902e52f0a089bc76897040e082f937763848645e0705"
    )
    box = secretbox.seal(message, nonce, key)
    assert box.hex().startswith("f3ffc7703f9400e52a7dfb4b3d3305d98e993b9f48681273c29650ba32fc76ce")
    assert secretbox.unseal(box, nonce, key) == message
    assert secretbox.unseal(box[:-1] + bytes([box[-1] ^ 1]), nonce, key) is None
    assert secretbox.unseal(box, nonce, bytes(32)) is None
    assert secretbox.unseal(b"", nonce, key) is None


def test_reads_what_cosign_made(tmp_path: Path) -> None:
    file = tmp_path / "cosign.key"
    file.write_text(COSIGN_KEY)
    assert keys.load_private(file, lambda: b"pw").public.id == COSIGN_ID
    with pytest.raises(ConfigError, match="wrong password"):
        keys.load_private(file, lambda: b"other")


def test_a_pair_of_ours(tmp_path: Path) -> None:
    public = keys.generate(tmp_path / "k", b"secret")
    private = keys.load_private(tmp_path / "k.key", lambda: b"secret")
    assert private.public.id == public.id == keys.load_public(tmp_path / "k.pub").id
    assert stat.S_IMODE((tmp_path / "k.key").stat().st_mode) == 0o600
    signature = private.sign(b"data")
    assert public.verifies(signature, b"data") and not public.verifies(signature, b"date")
    assert not public.verifies(b"", b"data")
    with pytest.raises(ConflictError):
        keys.generate(tmp_path / "k", b"secret")


def test_reads_what_openssl_made(tmp_path: Path) -> None:
    words = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]
    subprocess.run([*words, tmp_path / "plain.pem"], check=True, capture_output=True)
    keys.load_private(tmp_path / "plain.pem", unasked)
    more = ["-aes256", "-pass", "pass:pw"]
    subprocess.run([*words, tmp_path / "locked.pem", *more], check=True, capture_output=True)
    keys.load_private(tmp_path / "locked.pem", lambda: b"pw")
    with pytest.raises(ConfigError, match="wrong password"):
        keys.load_private(tmp_path / "locked.pem", lambda: b"no")


@pytest.mark.parametrize("text", ["", "rubbish", COSIGN_KEY.replace("eyJr", "eyJx"), COSIGN_KEY[:200]])
def test_what_is_no_key(tmp_path: Path, text: str) -> None:
    file = tmp_path / "k"
    file.write_text(text)
    with pytest.raises(ConfigError):
        keys.load_private(file, lambda: b"pw")
    with pytest.raises(ConfigError):
        keys.load_public(file)
    with pytest.raises(NotFoundError):
        keys.load_public(tmp_path / "missing")


def test_a_key_file_cannot_take_all_memory(tmp_path: Path) -> None:
    import base64

    raw = base64.b64decode("".join(COSIGN_KEY.splitlines()[1:-1])).replace(b'"N":65536', b'"N":1073741824')
    body = base64.b64encode(raw).decode()
    label = "ENCRYPTED SIGSTORE PRIVATE KEY"
    (tmp_path / "k").write_text(f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
    with pytest.raises(ConfigError, match="out of bounds"):
        keys.load_private(tmp_path / "k", lambda: b"pw")


def test_other_curves_are_refused(tmp_path: Path) -> None:
    words = ["openssl", "genpkey", "-algorithm", "ED25519", "-out", str(tmp_path / "k")]
    subprocess.run(words, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="P-256"):
        keys.load_private(tmp_path / "k", unasked)
