# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""The policy: what it refuses before a byte of an image is fetched, and who can get around it (nobody)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cryoci.errors import ConfigError, ImageError, NotFoundError, TrustError, UsageError
from cryoci.ociimage import blob, image, reference, referrers, stores
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import INDEX, MANIFEST, Descriptor, digest_of
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.trust import envelope, keys, policy
from cryoci.ociimage.trust.sign import sign
from cryoci.ociimage.trust.verify import require, verify
from tests.unit.images import (  # noqa: F401
    Proxy,
    Request,
    checkpoint,
    no_credentials,
    proxy,
    registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFIX of a key pair; scrypt is slow, so one serves all tests."""
    prefix = tmp_path_factory.mktemp("keys") / "prod"
    keys.generate(prefix, b"pw")
    keys.generate(prefix.with_name("other"), b"pw")
    return prefix


@pytest.fixture(scope="module")
def key(pair: Path) -> keys.SigningKey:
    return keys.load_private(pair.with_name("prod.key"), lambda: b"pw")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of this node's policy, not there yet."""
    monkeypatch.setattr(policy, "PATH", tmp_path / "policy.toml")
    yield tmp_path / "policy.toml"


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)


def cryoci(verb: str, *words: str) -> Result:
    command: click.Command = importlib.import_module(f"cryoci.cli.{verb}").command
    return CliRunner().invoke(command, words)


def strict(pair: Path, match: str = "*", more: str = "") -> str:
    return f'mode = "strict"\n[[rule]]\nmatch = "{match}"\nkeys = ["{pair}.pub"]\n{more}'


def at(text: str) -> RegistryRef:
    ref = reference.parse(text)
    assert isinstance(ref, RegistryRef)
    return ref


def test_unsigned_is_refused_before_anything_is_fetched(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, node: Path, pair: Path
) -> None:
    place = f"{proxy.host}/prod/unsigned:1"
    image.push(checkpoint, at(place))
    write(node, strict(pair))
    proxy.log.clear()
    for target in (str(tmp_path / "out"), "kept:1"):
        result = cryoci("pull", place, target)
        assert isinstance(result.exception, TrustError)
        assert "is refused" in str(result.exception) and "it has none" in str(result.exception)
    assert not any("/blobs/" in path for _, path in proxy.log)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert not image.list_images(LayoutRef(reference.default_store()))


def test_signed_passes_and_its_signature_travels(
    registry: str, checkpoint: Path, tmp_path: Path, node: Path, pair: Path, key: keys.SigningKey
) -> None:
    place = at(f"{registry}/prod/signed:1")
    digest = image.push(checkpoint, place).digest
    sign(place, key)
    write(node, strict(pair, more="provenance = true\n"))
    assert cryoci("pull", str(place), str(tmp_path / "out")).exit_code == 0
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    # into the local store, with what is attached; and from there under the same policy
    assert cryoci("pull", str(place), "kept:1").exit_code == 0
    kept = LayoutRef(reference.default_store(), "kept:1")
    assert policy.enforce(kept, digest).signers == (str(pair) + ".pub",)
    assert [s.name for s in image.list_images(kept)] == ["kept:1"]
    back = at(f"{registry}/prod/back:1")
    image.copy(kept, back)
    assert policy.enforce(back, digest).signers
    assert [s.name for s in image.list_images(back)] == ["1"]
    image.remove(kept)
    assert not list((reference.default_store() / "blobs/sha256").iterdir())


def test_signatures_go_with_the_last_name(
    registry: str, checkpoint: Path, pair: Path, key: keys.SigningKey
) -> None:
    """In registries and layouts, by rm and by gc; what belongs to another image stays."""
    for place in (f"{registry}/prod/going", "oci:{store}"):
        place = place.format(store=reference.default_store())
        first, second = (reference.parse(f"{place}:{n}") for n in (1, 2))
        assert isinstance(first, (LayoutRef, RegistryRef)) and isinstance(second, (LayoutRef, RegistryRef))
        for day, ref in ((1, first), (2, second)):
            image.push(checkpoint, ref, created=datetime(2026, 11, day, tzinfo=UTC))
            sign(ref, key)
        store = stores.open_store(first)
        before = len(store.names())
        assert before > 4  # tags of signatures beside those of images
        if isinstance(first, LayoutRef):
            image.remove(first)
        else:
            done = cryoci("gc", place, "--keep-last", "1", "--json")
            assert [v["name"] for v in json.loads(done.stdout)["verdicts"] if v["removed"]] == ["1"]
        assert len(store.names()) == before // 2
        assert require(store, store.get_manifest("2").digest, [Path(f"{pair}.pub")]).vouched
        assert cryoci("rm", str(second)).exit_code == 0
        try:
            assert store.names() == []
        except NotFoundError:
            pass  # a registry may forget a repository without tags


def test_warn_says_so_and_goes_on(registry: str, checkpoint: Path, tmp_path: Path, node: Path) -> None:
    place = f"{registry}/warn/c:1"
    image.push(checkpoint, at(place))
    result = cryoci("pull", "--json", place, str(tmp_path / "out"))
    assert result.exit_code == 0 and "nobody vouches for" in result.stderr
    json.loads(result.stdout)
    write(node, 'mode = "off"\n')
    assert not cryoci("pull", place, str(tmp_path / "out2")).stderr


def test_nothing_comes_to_the_node_around_the_policy(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, node: Path, pair: Path
) -> None:
    """The local store may be accepted as a whole: whatever fills it has asked. So has what other engines are given."""
    place, store = f"{proxy.host}/prod/around:1", f"oci:{reference.default_store()}:"
    image.push(checkpoint, at(place))
    saved = tmp_path / "saved.tar"
    assert cryoci("save", place, str(saved)).exit_code == 0
    ways = {
        "copy": (place, "kept:1"),
        "load": (str(saved), "kept:1"),
        "warm": (place,),
        "convert": (place, "--to", "podman", "-o", str(tmp_path / "c.tar")),
    }
    rule = f'[[rule]]\nmatch = "{store}*"\naccept = true\n'
    write(node, strict(pair) + rule)
    proxy.log.clear()
    for verb, words in ways.items():
        refused = cryoci(verb, *words)
        assert isinstance(refused.exception, TrustError) and "is refused" in str(refused.exception), verb
    assert not any("/blobs/" in path for _, path in proxy.log)
    assert not image.list_images(LayoutRef(reference.default_store())) and not (tmp_path / "c.tar").exists()
    write(node, strict(pair).replace("strict", "warn") + rule)
    for verb, words in ways.items():
        passed = cryoci(verb, *words)
        assert passed.exit_code == 0 and "nobody vouches for" in passed.stderr, (verb, passed.output)
    # between registries it is for those to judge who will use it, and so it is on the way out
    write(node, strict(pair))
    assert cryoci("copy", place, f"{proxy.host}/prod/elsewhere:1").exit_code == 0
    assert cryoci("load", str(saved), f"{proxy.host}/prod/loaded:1").exit_code == 0


def test_other_keys_do_not_count(
    registry: str, checkpoint: Path, pair: Path, key: keys.SigningKey, node: Path
) -> None:
    place = at(f"{registry}/prod/foreign:1")
    digest = image.push(checkpoint, place).digest
    sign(place, key)
    write(node, strict(pair.with_name("other")))
    with pytest.raises(TrustError, match="by other keys or damaged"):
        policy.enforce(place, digest)


def test_a_signature_of_another_image_does_not_count(
    registry: str, checkpoint: Path, pair: Path, key: keys.SigningKey, node: Path
) -> None:
    """Signatures moved to an image that they do not name."""
    good, evil = at(f"{registry}/swap/x:good"), at(f"{registry}/swap/x:evil")
    signed = image.push(checkpoint, good).digest
    sign(good, key)
    other = image.push(checkpoint, evil, annotations={"com.example.x": "y", "x": "y"}).digest
    assert signed != other
    store = Registry(good)
    older = store.get_manifest(referrers.tag(signed, ".sig"))
    store.put_manifest(older.data, older.media_type, referrers.tag(other, ".sig"))
    index = store.get_manifest(referrers.tag(signed))
    store.put_manifest(index.data, index.media_type, referrers.tag(other))
    assert verify(store, signed, [key.public]).signatures
    found = verify(store, other, [key.public])
    assert not found.vouched and found.others >= 2
    write(node, strict(pair))
    with pytest.raises(TrustError):
        policy.enforce(evil, other)


def test_an_attestation_is_no_signature(registry: str, checkpoint: Path, key: keys.SigningKey) -> None:
    place = at(f"{registry}/attested/x:1")
    digest = image.push(checkpoint, place).digest
    store = Registry(place)
    top = store.get_manifest(digest)
    subject = Descriptor(top.media_type, digest, len(top.data))
    claim = envelope.bundle(key, "https://example.com/scanned/v1", {"bad": True}, digest)
    referrers.attach(store, envelope.BUNDLE, subject, claim, {})
    found = verify(store, digest, [key.public])
    assert len(found.vouched) == 1 and not found.signatures


@pytest.mark.parametrize("damage", ["bits", "json", "huge", "no-layers", "other-type"])
def test_rubbish_beside_an_image_vouches_for_nothing(
    registry: str, checkpoint: Path, key: keys.SigningKey, damage: str
) -> None:
    place = at(f"{registry}/rubbish/{damage}:1")
    digest = image.push(checkpoint, place).digest
    store = Registry(place)
    top = store.get_manifest(digest)
    subject = Descriptor(top.media_type, digest, len(top.data))
    bundle = envelope.bundle(key, envelope.SIGN_PREDICATE, {}, digest)
    kind = envelope.BUNDLE
    if damage == "bits":
        bundle = bundle.replace(b'"payload":"ey', b'"payload":"eX')
    elif damage == "json":
        bundle = b"{" * 10_000
    elif damage == "huge":
        bundle = b" " * (2 << 20)
    elif damage == "other-type":
        kind = "application/spdx+json"
    if damage == "no-layers":
        data = referrers.artifact(kind, subject, [], {})
        empty = Descriptor(referrers.EMPTY, digest_of(b"{}"), 2)
        store.put_blob(blob.Bytes(b"{}"), empty, lambda n: None)
        store.put_manifest(data, MANIFEST, None)
        entry = Descriptor(MANIFEST, digest_of(data), len(data))
        referrers._note(store, digest, [entry])
    else:
        referrers.attach(store, kind, subject, bundle, {})
    # and rubbish where the older signatures lie
    store.put_manifest(top.data, top.media_type, referrers.tag(digest, ".sig"))
    found = verify(store, digest, [key.public])
    assert not found.vouched and found.others == 1
    # none of it keeps the image from travelling
    assert image.copy(place, LayoutRef(reference.default_store(), "c:1")).digest == digest


def test_a_list_of_referrers_that_is_none(registry: str, checkpoint: Path, key: keys.SigningKey) -> None:
    place = at(f"{registry}/rubbish/list:1")
    digest = image.push(checkpoint, place).digest
    store = Registry(place)
    inner = stores.resolve(store, digest)
    store.put_manifest(inner.manifest_bytes, inner.manifest_type, referrers.tag(digest))
    found = verify(store, digest, [key.public])
    assert not found.vouched and found.others == 1
    with pytest.raises(ImageError):  # nor is it overwritten
        sign(place, key)
    assert image.copy(place, LayoutRef(reference.default_store(), "c:1")).digest == digest


def test_registry_with_the_referrers_api(
    proxy: Proxy, checkpoint: Path, key: keys.SigningKey, tmp_path: Path
) -> None:
    """docker-registry has no such API, so the proxy plays one that keeps its account page by page."""
    place = at(f"{proxy.host}/api/x:1")
    digest = image.push(checkpoint, place).digest
    kept: list[dict[str, object]] = []

    def before(request: Request) -> bool:
        if request.method == "PUT" and "/manifests/sha256:" in request.path:
            size = int(request.handler.headers["Content-Length"])
            data = request.handler.rfile.read(size)
            value = json.loads(data)
            if value.get("subject", {}).get("digest") == digest:
                kept.append({"mediaType": MANIFEST, "digest": digest_of(data), "size": size})
            Registry(at(f"{proxy.upstream}/api/x")).put_manifest(data, MANIFEST, None)
            return request.answer(201, headers={"OCI-Subject": digest})
        if "/referrers/" not in request.path:
            return False
        page = int(request.path.partition("page=")[2] or 0)
        body = {"schemaVersion": 2, "mediaType": INDEX, "manifests": kept[page : page + 1]}
        headers = {"Content-Type": INDEX}
        if page + 1 < len(kept):
            headers["Link"] = f'<{request.path.partition("?")[0]}?page={page + 1}>; rel="next"'
        return request.answer(200, json.dumps(body).encode() if digest in request.path else b"", headers)

    proxy.before = before
    store = Registry(place)
    top = store.get_manifest(digest)
    subject = Descriptor(top.media_type, digest, len(top.data))
    for predicate in (envelope.SIGN_PREDICATE, "https://example.com/x"):
        bundle = envelope.bundle(key, predicate, {}, digest)
        referrers.attach(store, envelope.BUNDLE, subject, bundle, {})
    assert len(kept) == 2 and referrers.tag(digest) not in store.names()
    assert len(verify(store, digest, [key.public]).vouched) == 2


def test_layout_signatures_and_a_second_signer(checkpoint: Path, tmp_path: Path, pair: Path) -> None:
    ref = LayoutRef(tmp_path / "layout", "c:1")
    digest = image.push(checkpoint, ref).digest
    signers = [keys.load_private(pair.with_name(f"{n}.key"), lambda: b"pw") for n in ("prod", "other")]
    for signer in signers:
        sign(ref, signer)
    store = Layout(ref.path)
    for signer in signers:
        assert len(verify(store, digest, [signer.public]).signatures) == 2
    store.collect()  # takes superseded lists, and nothing that a signature needs
    assert len(verify(store, digest, [signers[0].public]).vouched) == 3


def test_directories_and_archives_under_strict(checkpoint: Path, node: Path, pair: Path) -> None:
    ref = reference.parse(str(checkpoint))
    assert not policy.enforce(ref, None).warning
    write(node, strict(pair))
    with pytest.raises(TrustError, match="carry no signature"):
        policy.enforce(ref, None)
    write(node, f'mode = "strict"\n[[rule]]\nmatch = "{checkpoint.parent.resolve()}/*"\naccept = true\n')
    assert not policy.enforce(ref, None).warning
    write(node, 'mode = "strict"\n')
    with pytest.raises(TrustError, match="no rule"):
        policy.enforce(ref, None)


def test_no_way_around_a_rule_by_links_or_dots(checkpoint: Path, tmp_path: Path, node: Path) -> None:
    trusted, evil = tmp_path / "trusted", tmp_path / "evil"
    trusted.mkdir()
    checkpoint.rename(evil)
    (trusted / "link").symlink_to(evil)
    write(node, f'mode = "strict"\n[[rule]]\nmatch = "{trusted.resolve()}/*"\naccept = true\n')
    for way in (trusted / "link", trusted / ".." / "evil"):
        with pytest.raises(TrustError):
            policy.enforce(reference.parse(str(way)), None)


@pytest.mark.parametrize(
    "text",
    [
        "[",
        'mode = "loose"',
        "strict = true",
        "rule = 1",
        '[[rule]]\nmatch = "x"',
        '[[rule]]\nkeys = ["x"]',
        '[[rule]]\nmatch = "x"\nkeys = ["k"]\naccept = true',
        '[[rule]]\nmatch = "x"\nkey = "k"',
        '[[rule]]\nmatch = "x"\naccept = "yes"',
        '[[rule]]\nmatch = "x"\nkeys = "k"',
        '[[rule]]\nmatch = "x"\nkeys = ["k"]\nmode = "no"',
    ],
)
def test_a_policy_that_cannot_be_read_refuses_all(node: Path, text: str) -> None:
    write(node, text)
    with pytest.raises(ConfigError):
        policy.enforce(LayoutRef(Path("/x"), "y"), "sha256:" + "0" * 64)


def test_a_policy_that_others_may_write_is_none(node: Path) -> None:
    node.write_text('mode = "off"\n')
    node.chmod(0o666)
    with pytest.raises(ConfigError, match="can be changed by others"):
        policy.load()


def test_first_rule_wins_and_keys_are_relative(node: Path) -> None:
    write(
        node,
        '[[rule]]\nmatch = "h.io/a/*"\nkeys = ["k.pub"]\nmode = "strict"\n'
        '[[rule]]\nmatch = "h.io/*"\naccept = true\n',
    )
    loaded = policy.load()
    assert loaded.rule("h.io/a/b") == policy.Rule("h.io/a/*", (node.parent / "k.pub",), mode="strict")
    found = loaded.rule("h.io/b")
    assert found is not None and found.accept and loaded.rule("g.io/b") is None


def test_sign_and_verify_by_command(
    registry: str,
    checkpoint: Path,
    pair: Path,
    node: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    place = f"{registry}/cli/signed:1"
    digest = image.push(checkpoint, at(place)).digest
    (tmp_path / "pw").write_text("pw\n")
    result = cryoci("sign", "-k", f"{pair}.key", "--password-file", str(tmp_path / "pw"), place)
    assert result.exit_code == 0 and digest in result.stdout and "pw" not in result.output
    said = cryoci("verify", "-k", f"{pair}.pub", place)
    assert said.exit_code == 0 and digest in said.stdout and "signed on" in said.stdout
    bare = cryoci("verify", place)
    assert isinstance(bare.exception, UsageError)
    write(node, strict(pair))
    assert cryoci("verify", "-q", place).stdout.strip() == digest
    wrong = cryoci("verify", "-k", str(pair.with_name("other.pub")), place)
    assert isinstance(wrong.exception, TrustError)
    monkeypatch.setenv("COSIGN_PASSWORD", "no")
    assert isinstance(cryoci("sign", "-k", f"{pair}.key", place).exception, ConfigError)
    monkeypatch.delenv("COSIGN_PASSWORD")
    assert isinstance(cryoci("sign", "-k", f"{pair}.key", place).exception, UsageError)


def test_resolved_digest_is_what_gets_fetched(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, node: Path, pair: Path, key: keys.SigningKey
) -> None:
    """A tag that moves while the policy is asked does not bring in another image."""
    good = at(f"{proxy.upstream}/moved/x:1")
    image.push(checkpoint, good)
    sign(good, key)
    write(node, strict(pair))
    place = at(f"{proxy.host}/moved/x:1")
    tags = 0

    def before(request: Request) -> bool:
        nonlocal tags
        tags += request.path.endswith("/manifests/1")
        return False

    proxy.before = before
    gate = policy.Gate(place)
    pulled = image.pull(place, tmp_path / "out", gate=gate)
    assert tags == 1 and gate.verdict is not None and gate.verdict.digest == pulled.digest
    assert stores.open_store(place).get_manifest(pulled.digest).digest == pulled.digest
