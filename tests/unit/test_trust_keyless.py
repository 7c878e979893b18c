# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Identities in the policy: a real signature by sigstore's public service, authorities of our own, the real cosign.

tests/fixtures/sigstore: the bundle of pypi-attestations 0.0.19 (its own test/assets, Apache-2.0), made by a GitHub
workflow with Fulcio and Rekor, and the trusted root of sigstore's public service as sigstore 4.5.1 carries it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cryoci.errors import ConfigError, ImageError, TrustError
from cryoci.ociimage import image, referrers, stores
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.reference import LayoutRef
from cryoci.ociimage.trust import envelope, keys, policy, roots
from cryoci.ociimage.trust.identity import Identity, Keyless, Signed, simple_material
from cryoci.ociimage.trust.sign import sign
from cryoci.ociimage.trust.verify import verify
from tests.nodes.tree import REPO
from tests.unit.images import checkpoint, no_credentials, registry  # noqa: F401
from tests.unit.test_trust_cosign import COSIGNS, NO_SERVICES, cosign, push

pytestmark = pytest.mark.usefixtures("no_credentials")
FIXTURES = REPO / "tests/fixtures/sigstore"
WORKFLOW = "https://github.com/trailofbits/pypi-attestations/.github/workflows/release.yml@refs/tags/v0.0.19"
GITHUB = "https://token.actions.githubusercontent.com"
WHO, BY = "https://ci.example.com/team/app/build.yml@refs/heads/main", "https://ci.example.com"
NOW = datetime.now(UTC)


def published() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FIXTURES / "bundle.json").read_text())
    return value


def judge(value: dict[str, Any], *identities: Identity, files: tuple[Path, ...] = ()) -> str | None:
    found = envelope.parse_bundle(json.dumps(value).encode())
    assert found.material is not None
    trusted = roots.load(files or (FIXTURES / "trusted_root.json",))
    return Keyless(identities or (Identity(WORKFLOW, GITHUB),), trusted).signer(found.material, found.signed)


def test_a_signature_of_the_public_service() -> None:
    assert judge(published()) == f"{WORKFLOW} by {GITHUB}"
    assert judge(published(), Identity("https://github.com/trailofbits/*", GITHUB))
    assert not judge(published(), Identity("https://github.com/trailofbits/", GITHUB))
    assert not judge(published(), Identity(WORKFLOW, "https://gitlab.com"))
    assert not judge(published(), Identity("https://github.com/evil/*", GITHUB), Identity("*", "https://x"))


def _payload(value: dict[str, Any]) -> None:
    inside = value["dsseEnvelope"]
    text = base64.b64decode(inside["payload"]).replace(b"pypi_attestations", b"pypi_attestationz")
    inside["payload"] = base64.b64encode(text).decode()


def _entry(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["verificationMaterial"]["tlogEntries"][0].update(fields)


def _promise(value: dict[str, Any]) -> None:
    promise = value["verificationMaterial"]["tlogEntries"][0]["inclusionPromise"]
    raw = bytearray(base64.b64decode(promise["signedEntryTimestamp"]))
    raw[-1] ^= 1
    promise["signedEntryTimestamp"] = base64.b64encode(raw).decode()


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "payload": _payload,
    "time": _entry(integratedTime="1733000000"),
    "index": _entry(logIndex="1"),
    "log": _entry(logId={"keyId": base64.b64encode(bytes(32)).decode()}),
    "no-promise": _entry(inclusionPromise=None),
    "promise": _promise,
    "no-entry": lambda value: value["verificationMaterial"].update(tlogEntries=[]),
    "signature": lambda value: value["dsseEnvelope"].update(signatures=[{"sig": "MEUCIQ=="}]),
    "no-signature": lambda value: value["dsseEnvelope"].update(signatures=[]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_altered_vouches_for_nobody(name: str) -> None:
    """Without a log that saw it, the certificate has ended long ago."""
    value = published()
    CHANGES[name](value)
    assert judge(value) is None


def test_roots_as_pem(tmp_path: Path) -> None:
    """The same in PEM; without the log's key nobody knows when it was signed, without the authority by whom."""
    trusted = json.loads((FIXTURES / "trusted_root.json").read_text())
    chain = trusted["certificateAuthorities"][1]["certChain"]["certificates"]
    certificates = [x509.load_der_x509_certificate(base64.b64decode(c["rawBytes"])) for c in chain]
    pem = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)
    key = base64.b64encode(base64.b64decode(trusted["tlogs"][0]["publicKey"]["rawBytes"])).decode()
    log = f"-----BEGIN PUBLIC KEY-----\n{key}\n-----END PUBLIC KEY-----\n".encode()
    for data, known in ((pem + log, True), (pem, False), (log, False)):
        (tmp_path / "roots.pem").write_bytes(data)
        assert bool(judge(published(), files=(tmp_path / "roots.pem",))) == known


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}',
        '{"mediaType": "application/vnd.dev.sigstore.trustedroot", "certificateAuthorities": [{}]}',
        '{"mediaType": "application/vnd.dev.sigstore.trustedroot", "tlogs": [{"publicKey": 1}]}',
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    ],
)
def test_roots_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "roots").write_text(text)
    with pytest.raises(ConfigError):
        roots.load([tmp_path / "roots"])
    with pytest.raises(ConfigError):
        roots.load([tmp_path / "absent"])


@dataclass
class Authority:
    """A certificate authority of a site's own."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def issue(
    parent: Authority | None,
    name: str,
    *,
    ca: bool = False,
    days: tuple[int, int] = (-1, 1),
    length: int | None = None,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING,
    critical: bool = False,
    subject: str = WHO,
    sign_certificates: bool = True,
) -> Authority:
    """A certificate of `parent`'s, or of its own; for a leaf with Fulcio's extension."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(parent.certificate.subject if parent else own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=days[0]))
        .not_valid_after(NOW + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca, length), critical=True)
        .add_extension(
            x509.KeyUsage(not ca, False, False, False, False, ca and sign_certificates, ca, False, False),
            True,
        )
    )
    above = parent.key.public_key() if parent else key.public_key()
    made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(above), False)
    made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    if not ca:
        text = BY.encode()
        made = made.add_extension(x509.ExtendedKeyUsage([usage]), False)
        made = made.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(subject)]), True
        )
        for number, value in (("1", text), ("8", b"\x0c" + bytes([len(text)]) + text)):
            oid = x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{number}")
            made = made.add_extension(x509.UnrecognizedExtension(oid, value), critical)
    return Authority(key, made.sign(parent.key if parent else key, hashes.SHA256()))


@pytest.fixture(scope="module")
def root() -> Authority:
    return issue(None, "root", ca=True, days=(-900, 900))


def signed(leaf: Authority, digest: str, chain: tuple[Authority, ...] = ()) -> dict[str, Any]:
    """cosign 3's bundle about an image, by the key of `leaf`."""
    own = keys.SigningKey(leaf.key)
    value: dict[str, Any] = json.loads(envelope.bundle(own, envelope.SIGN_PREDICATE, {}, digest))
    listed = [{"rawBytes": _raw(one)} for one in (leaf, *chain)]
    value["verificationMaterial"] = {"x509CertificateChain": {"certificates": listed}}
    return value


def logged(value: dict[str, Any], leaf: Authority, log: keys.SigningKey, when: datetime) -> dict[str, Any]:
    """The same, with the entry of a log that took it in at a time."""
    inside = value["dsseEnvelope"]
    payload = base64.b64decode(inside["payload"])
    spec = {
        "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()},
        "signatures": [
            {"signature": inside["signatures"][0]["sig"], "verifier": base64.b64encode(leaf.pem).decode()}
        ],
    }
    body = json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode()
    number = base64.b64decode(log.public.id)
    stated = {
        "body": base64.b64encode(body).decode(),
        "integratedTime": int(when.timestamp()),
        "logID": number.hex(),
        "logIndex": 7,
    }
    promise = log.sign(json.dumps(stated, sort_keys=True, separators=(",", ":")).encode())
    entry = {
        "logIndex": "7",
        "logId": {"keyId": log.public.id},
        "integratedTime": str(stated["integratedTime"]),
        "canonicalizedBody": stated["body"],
        "inclusionPromise": {"signedEntryTimestamp": base64.b64encode(promise).decode()},
    }
    value["verificationMaterial"]["tlogEntries"] = [entry]
    return value


DIGEST = "sha256:" + "ab" * 32


def accepts(tmp_path: Path, value: dict[str, Any], *trusted: Authority, log: bytes = b"") -> bool:
    (tmp_path / "roots.pem").write_bytes(b"".join(one.pem for one in trusted) + log)
    return judge(value, Identity(WHO, BY), files=(tmp_path / "roots.pem",)) is not None


def test_authorities_of_a_sites_own(root: Authority, tmp_path: Path) -> None:
    leaf = issue(root, "leaf")
    assert accepts(tmp_path, signed(leaf, DIGEST), root)
    assert not accepts(tmp_path, signed(leaf, DIGEST), issue(None, "root", ca=True))  # of the same name
    middle = issue(root, "middle", ca=True, length=0)
    below = issue(middle, "leaf")
    assert accepts(tmp_path, signed(below, DIGEST, (middle,)), root)
    assert accepts(tmp_path, signed(below, DIGEST), middle)
    assert not accepts(tmp_path, signed(below, DIGEST), root)
    deeper = issue(middle, "deeper", ca=True)
    assert not accepts(
        tmp_path, signed(issue(deeper, "leaf"), DIGEST, (deeper, middle)), root
    )  # path length


def test_certificates_that_may_not(root: Authority, tmp_path: Path) -> None:
    odd = {
        "authority as signer": issue(root, "leaf", ca=True),
        "for servers": issue(root, "leaf", usage=ExtendedKeyUsageOID.SERVER_AUTH),
        "critical and not understood": issue(root, "leaf", critical=True),
        "somebody else": issue(root, "leaf", subject="https://evil.example.com/"),
        "ended": issue(root, "leaf", days=(-3, -2)),
        "to come": issue(root, "leaf", days=(2, 3)),
        "of a leaf": issue(issue(root, "leaf"), "leaf below"),
        "of an authority that may not": issue(issue(root, "no", ca=True, sign_certificates=False), "leaf"),
    }
    for name, leaf in odd.items():
        value = signed(leaf, DIGEST)
        try:
            assert not accepts(tmp_path, value, root), name
        except ImageError:
            assert name == "authority as signer"  # it has no extended usage at all
    between = issue(root, "no", ca=True, sign_certificates=False)
    assert not accepts(tmp_path, signed(issue(between, "leaf"), DIGEST, (between,)), root)
    ended = issue(root, "ended", ca=True, days=(-30, -20))
    assert not accepts(tmp_path, signed(issue(ended, "leaf"), DIGEST, (ended,)), root)


def test_a_log_says_when(root: Authority, tmp_path: Path) -> None:
    keys.generate(tmp_path / "log", b"")
    log = keys.load_private(tmp_path / "log.key", lambda: b"")
    pem = (tmp_path / "log.pub").read_bytes()
    leaf = issue(root, "leaf", days=(-30, -29))
    then = NOW - timedelta(days=29, hours=12)
    assert accepts(tmp_path, logged(signed(leaf, DIGEST), leaf, log, then), root, log=pem)
    assert not accepts(tmp_path, logged(signed(leaf, DIGEST), leaf, log, then), root)
    assert not accepts(tmp_path, logged(signed(leaf, DIGEST), leaf, log, NOW), root, log=pem)
    other = issue(root, "leaf", days=(-30, -29))
    mixed = logged(signed(leaf, DIGEST), other, log, then)  # an entry about another certificate
    assert not accepts(tmp_path, mixed, root, log=pem)
    stolen = logged(signed(leaf, DIGEST), leaf, log, then)
    stolen["dsseEnvelope"] = signed(leaf, "sha256:" + "cd" * 32)["dsseEnvelope"]  # signed after it has ended
    assert not accepts(tmp_path, stolen, root, log=pem)


def test_the_older_form_says_when_too(root: Authority, tmp_path: Path) -> None:
    """cosign 2's tags: certificate, chain and the log's answer in annotations (cosign pkg/oci/static, bundle)."""
    keys.generate(tmp_path / "log", b"")
    log = keys.load_private(tmp_path / "log.key", lambda: b"")
    middle = issue(root, "middle", ca=True, days=(-900, 900))
    leaf = issue(middle, "leaf", days=(-30, -29))
    payload = envelope.simple("h.io/a", DIGEST)
    made = keys.SigningKey(leaf.key).sign(payload)
    content = {
        "content": base64.b64encode(made).decode(),
        "publicKey": {"content": base64.b64encode(leaf.pem).decode()},
    }
    data = {"hash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()}}
    body = json.dumps({"kind": "hashedrekord", "spec": {"data": data, "signature": content}}).encode()
    when = NOW - timedelta(days=29, hours=12)
    stated = {
        "body": base64.b64encode(body).decode(),
        "integratedTime": int(when.timestamp()),
        "logIndex": 7,
        "logID": base64.b64decode(log.public.id).hex(),
    }
    promise = log.sign(json.dumps(stated, sort_keys=True, separators=(",", ":")).encode())
    noted = {
        "dev.sigstore.cosign/certificate": leaf.pem.decode(),
        "dev.sigstore.cosign/chain": middle.pem.decode(),
        "dev.sigstore.cosign/bundle": json.dumps(
            {"SignedEntryTimestamp": base64.b64encode(promise).decode(), "Payload": stated}
        ),
    }
    (tmp_path / "roots.pem").write_bytes(root.pem + (tmp_path / "log.pub").read_bytes())
    known = Keyless((Identity(WHO, BY),), roots.load([tmp_path / "roots.pem"]))
    signatures = Signed(payload, payload, (made,))
    material = simple_material(noted)
    assert material is not None and known.signer(material, signatures) == f"{WHO} by {BY}"
    del noted["dev.sigstore.cosign/bundle"]
    material = simple_material(noted)
    assert material is not None and known.signer(material, signatures) is None
    assert simple_material({}) is None
    for damaged in ("", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"):
        noted["dev.sigstore.cosign/chain"] = damaged
        if damaged:
            with pytest.raises(ImageError):
                simple_material(noted)
    for text in ("{", "[]", "{}", '{"Payload": 1, "SignedEntryTimestamp": ""}'):
        with pytest.raises(ImageError):
            simple_material(
                {"dev.sigstore.cosign/certificate": leaf.pem.decode(), "dev.sigstore.cosign/bundle": text}
            )


def test_damaged_material(root: Authority, tmp_path: Path) -> None:
    leaf = issue(root, "leaf")
    for certificate in ("AAAA", "!", 7, None):
        value = signed(leaf, DIGEST)
        value["verificationMaterial"] = {"certificate": {"rawBytes": certificate}}
        with pytest.raises(ImageError):
            accepts(tmp_path, value, root)


def test_under_a_policy(
    checkpoint: Path, tmp_path: Path, root: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: strict, an image with the signature of an identity; of another; and a key beside it."""
    monkeypatch.setattr(policy, "PATH", tmp_path / "policy.toml")
    ref = LayoutRef(tmp_path / "layout", "a")
    digest = image.push(checkpoint, ref).digest
    store = stores.open_store(ref)
    (tmp_path / "ca.pem").write_bytes(root.pem)
    rule = 'mode = "strict"\n[[rule]]\nmatch = "*"\nroots = ["ca.pem"]\n'
    who = f'identities = [{{ subject = "https://ci.example.com/team/*", issuer = "{BY}" }}]\n'
    (tmp_path / "policy.toml").write_text(rule + who)
    with pytest.raises(TrustError, match="no signature of https://ci"):
        policy.enforce(ref, digest)
    evil = issue(root, "leaf", subject="https://evil.example.com/")
    attach(store, digest, signed(evil, digest))
    attach(store, digest, signed(issue(root, "leaf"), DIGEST))  # of another image
    with pytest.raises(TrustError, match="2 by other keys or damaged"):
        policy.enforce(ref, digest)
    attach(store, digest, signed(issue(root, "leaf"), digest))
    assert policy.enforce(ref, digest).signers == (f"{WHO} by {BY}",)
    pulled = image.pull(ref, tmp_path / "out", gate=policy.Gate(ref))
    assert pulled.digest == digest
    keys.generate(tmp_path / "k", b"")
    (tmp_path / "policy.toml").write_text(f'{rule}keys = ["k.pub"]\n{who}')
    sign(ref, keys.load_private(tmp_path / "k.key", lambda: b""))
    assert len(policy.enforce(ref, digest).signers) == 2


def attach(store: Any, digest: str, value: dict[str, Any]) -> None:
    top = store.get_manifest(digest)
    subject = Descriptor(top.media_type, digest, len(top.data))
    referrers.attach(store, envelope.BUNDLE, subject, json.dumps(value).encode(), {})


@pytest.mark.parametrize(
    "text",
    [
        'identities = [{ subject = "a", issuer = "b" }]',
        'identities = "x"\nroots = ["r"]',
        'identities = [{ subject = "*", issuer = "b" }]\nroots = ["r"]',
        'identities = [{ subject = "a" }]\nroots = ["r"]',
        'identities = [{ subject = "a", issuer = "b", more = "c" }]\nroots = ["r"]',
        'roots = ["r"]\nkeys = ["k"]',
        'identities = [{ subject = "a", issuer = "b" }]\nroots = ["r"]\naccept = true',
    ],
)
def test_rules_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text(f'[[rule]]\nmatch = "*"\n{text}\n')
    with pytest.raises(ConfigError):
        policy.load(tmp_path / "policy.toml")


@pytest.mark.parametrize("version", COSIGNS)
def test_cosign_signs_with_a_certificate(
    registry: str, checkpoint: Path, tmp_path: Path, root: Authority, version: str
) -> None:
    """The real cosign, with a certificate of a site's own authority; and it takes the identity as we do."""
    ref, digest = push(registry, checkpoint, f"keyless{version}")
    middle = issue(root, "middle", ca=True)
    leaf = issue(middle, "leaf")
    (tmp_path / "leaf.pem").write_bytes(leaf.pem)
    (tmp_path / "chain.pem").write_bytes(middle.pem + root.pem)
    (tmp_path / "middle.pem").write_bytes(middle.pem)
    (tmp_path / "root.pem").write_bytes(root.pem)
    (tmp_path / "none.json").write_text(NO_SERVICES)
    (tmp_path / "own.key").write_bytes(keys.encrypt(leaf.key, b"pw"))
    how = ["--tlog-upload=false"] if version == "2" else ["--signing-config", "none.json"]
    certificate = ["--certificate", "leaf.pem", "--certificate-chain", "chain.pem"]
    place = f"{ref.host}/{ref.repository}@{digest}"
    cosign(version, tmp_path, "sign", "--key", "own.key", *certificate, *how, "-y", place)
    # bundles of cosign 3 carry the leaf alone: what lies between belongs to the root of trust
    chain = [{"rawBytes": _raw(one)} for one in (middle, root)]
    trusted = {
        "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
        "certificateAuthorities": [
            {
                "uri": BY,
                "certChain": {"certificates": chain},
                "validFor": {"start": f"{NOW - timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"},
            }
        ],
    }
    (tmp_path / "trusted.json").write_text(json.dumps(trusted))
    store = stores.open_store(ref)
    for file in ("trusted.json", "chain.pem", *(["root.pem"] if version == "2" else [])):
        known = roots.load([tmp_path / file])
        found = verify(store, digest, [], Keyless((Identity(WHO, BY),), known))
        assert [v.key for v in found.signatures] == [f"{WHO} by {BY}"], file
        assert not verify(store, digest, [], Keyless((Identity(WHO, "https://other"),), known)).vouched
    theirs = (
        ["--ca-roots", "root.pem", "--ca-intermediates", "middle.pem"]
        if version == "2"
        else ["--trusted-root", "trusted.json"]
    )
    ignored = ["--insecure-ignore-tlog=true", "--insecure-ignore-sct=true"]
    for issuer, code in ((BY, 0), ("https://other", 1)):
        who = ["--certificate-identity", WHO, "--certificate-oidc-issuer", issuer]
        done = cosign(version, tmp_path, "verify", *theirs, *who, *ignored, place, check=False)
        assert bool(done.returncode) == bool(code), done.stderr


def _raw(one: Authority) -> str:
    return base64.b64encode(one.certificate.public_bytes(serialization.Encoding.DER)).decode()
