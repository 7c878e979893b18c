# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Signatures against the real cosign 2 and 3, both ways."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cryoci.ociimage import image, reference, stores
from cryoci.ociimage.trust import keys, provenance
from cryoci.ociimage.trust.sign import sign
from cryoci.ociimage.trust.verify import Findings, verify
from tests.nodes import tree
from tests.unit.images import checkpoint, no_credentials, program, registry  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
COSIGNS = {"2": "cosign", "3": tree.NEW_COSIGN}
# a signing configuration for cosign 3 that asks no service
NO_SERVICES = json.dumps(
    {
        "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
        "caUrls": [],
        "oidcUrls": [],
        "rekorTlogUrls": [],
        "tsaUrls": [],
        "rekorTlogConfig": {},
        "tsaConfig": {},
    }
)


def cosign(version: str, cwd: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COSIGN_PASSWORD": "pw", "HOME": str(cwd)}
    argv = [program(COSIGNS[version]), *words]
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stderr
    return done


def push(registry: str, checkpoint: Path, name: str) -> tuple[reference.RegistryRef, str]:
    ref = reference.parse(f"{registry}/cosign/{name}:1")
    assert isinstance(ref, reference.RegistryRef)
    return ref, image.push(checkpoint, ref).digest


def findings(ref: reference.RegistryRef, digest: str, key: Path) -> Findings:
    return verify(stores.open_store(ref), digest, [keys.load_public(key)])


@pytest.mark.parametrize("version", COSIGNS)
def test_cosign_verifies_what_we_sign(registry: str, checkpoint: Path, tmp_path: Path, version: str) -> None:
    ref, digest = push(registry, checkpoint, f"ours{version}")
    keys.generate(tmp_path / "k", b"pw")
    done = sign(ref, keys.load_private(tmp_path / "k.key", lambda: b"pw"))
    assert done.digest == digest and len(done.digests) == 2
    place = f"{ref.host}/{ref.repository}"
    common = ["--key", "k.pub", "--insecure-ignore-tlog=true"]
    for signed in done.digests:
        said = json.loads(cosign(version, tmp_path, "verify", *common, f"{place}@{signed}").stdout)
        assert said[0]["critical"]["image"]["docker-manifest-digest"] == signed
    # an empty root of trust: cosign 2 would ask the network for one
    (tmp_path / "root.json").write_text(
        '{"mediaType":"application/vnd.dev.sigstore.trustedroot+json;version=0.1"}'
    )
    kind = ["--type", "slsaprovenance1", "--new-bundle-format", "--trusted-root", "root.json"]
    stated = cosign(version, tmp_path, "verify-attestation", *common, *kind, f"{place}@{digest}")
    assert provenance.PREDICATE in stated.stdout or "verified" in stated.stderr
    keys.generate(tmp_path / "other", b"")
    refused = cosign(
        version, tmp_path, "verify", "--key", "other.pub", *common[2:], f"{place}@{digest}", check=False
    )
    assert refused.returncode != 0


@pytest.mark.parametrize("version", COSIGNS)
def test_we_verify_what_cosign_signs(registry: str, checkpoint: Path, tmp_path: Path, version: str) -> None:
    ref, digest = push(registry, checkpoint, f"theirs{version}")
    cosign(version, tmp_path, "generate-key-pair")
    place = f"{ref.host}/{ref.repository}@{digest}"
    (tmp_path / "none.json").write_text(NO_SERVICES)
    how = ["--tlog-upload=false"] if version == "2" else ["--signing-config", "none.json"]
    cosign(version, tmp_path, "sign", "--key", "cosign.key", *how, "-y", place)
    (tmp_path / "claim.json").write_text('{"a": 1}')
    more = ["--new-bundle-format"] if version == "2" else []
    kind = ["--type", "https://example.com/claim/v1", "--predicate", "claim.json"]
    cosign(version, tmp_path, "attest", "--key", "cosign.key", *how, *more, *kind, "-y", place)
    found = findings(ref, digest, tmp_path / "cosign.pub")
    assert [s.kind for s in found.signatures] == ["tag" if version == "2" else "bundle"]
    assert {v.predicate_type for v in found.vouched} >= {"https://example.com/claim/v1"}
    keys.generate(tmp_path / "k", b"")
    assert not findings(ref, digest, tmp_path / "k.pub").vouched


@pytest.mark.parametrize("version", COSIGNS)
def test_both_sign_with_one_key(registry: str, checkpoint: Path, tmp_path: Path, version: str) -> None:
    """A key file of ours serves cosign; signatures of both lie side by side."""
    ref, digest = push(registry, checkpoint, f"both{version}")
    keys.generate(tmp_path / "k", b"pw")
    private = keys.load_private(tmp_path / "k.key", lambda: b"pw")
    (tmp_path / "none.json").write_text(NO_SERVICES)
    how = ["--tlog-upload=false"] if version == "2" else ["--signing-config", "none.json"]
    place = f"{ref.host}/{ref.repository}@{digest}"
    cosign(version, tmp_path, "sign", "--key", "k.key", *how, "-y", place)
    sign(ref, private)
    sign(ref, private, with_provenance=False)  # a second time adds nothing
    found = findings(ref, digest, tmp_path / "k.pub")
    assert sorted(s.kind for s in found.signatures) == ["bundle", "tag"]
    assert found.others == 0 and len(found.provenance) == 1
    cosign(version, tmp_path, "verify", "--key", "k.pub", "--insecure-ignore-tlog=true", place)
