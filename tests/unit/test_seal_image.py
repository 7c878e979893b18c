# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Sealed images: who can open them, who cannot, and what an attacker who holds the registry can do (nothing)."""

from __future__ import annotations

import base64
import importlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from cryoci.errors import ConfigError, CryociError, ImageError, IntegrityError, TrustError, UsageError
from cryoci.ociimage import blob, image, reference, stores
from cryoci.ociimage.fetch import fetch
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import MANIFEST, Descriptor, Manifest, digest_of
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.seal import age, keyring, node, stream
from cryoci.ociimage.seal.keyring import Identities, Recipients
from tests.unit.images import (  # noqa: F401
    Proxy,
    checkpoint,
    no_credentials,
    no_sleep,
    program,
    proxy,
    registry,
    tree_of,
)
from tests.unit.test_ociimage_shelf import real  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
SECRET = b"the secret that must not be seen"


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    age.generate(tmp_path / "id.txt")
    return tmp_path / "id.txt"


@pytest.fixture
def to(identity: Path) -> Recipients:
    """The recipient that `identity` is the key of."""
    return Recipients.parse([identity.read_text().splitlines()[0].split(": ")[1]])


@pytest.fixture
def secret(checkpoint: Path) -> Path:
    """A checkpoint with SECRET in its memory and descriptions."""
    with open(checkpoint / "checkpoint/pages-1.img", "r+b") as file:
        file.write(SECRET)
    (checkpoint / "dump.log").write_bytes(SECRET)
    return checkpoint


def cryoci(verb: str, *words: str) -> Result:
    command: click.Command = importlib.import_module(f"cryoci.cli.{verb}").command
    return CliRunner().invoke(command, words)


def test_there_and_back(registry: str, secret: Path, tmp_path: Path, identity: Path) -> None:
    place = f"{registry}/seal/a:1"
    public = identity.read_text().splitlines()[0].split(": ")[1]
    assert cryoci("push", "--encrypt-to", public, str(secret), place).exit_code == 0
    pulled = cryoci("pull", "--decrypt-key", str(identity), place, str(tmp_path / "out"))
    assert pulled.exit_code == 0, pulled
    assert tree_of(tmp_path / "out") == tree_of(secret)
    # a copy stays encrypted, digest and all, and opens as well
    assert cryoci("pull", place, "kept:1").exit_code == 0
    again = cryoci("pull", "--decrypt-command", f"cat {identity}", "kept:1", str(tmp_path / "out2"))
    assert again.exit_code == 0 and tree_of(tmp_path / "out2") == tree_of(secret)
    for file in (reference.default_store() / "blobs/sha256").iterdir():
        assert SECRET not in file.read_bytes()
    shown = json.loads(cryoci("inspect", "--json", place).stdout)
    assert shown["container"]["name"] == "counter" and "encrypted" in shown["problems"][0]
    assert len(shown["problems"]) == 1 and shown["complete"] is False
    assert all(layer["media_type"].endswith("tar+zstd+encrypted") for layer in shown["layers"])


def test_looking_into_a_sealed_image(real: Path, tmp_path: Path, identity: Path, to: Recipients) -> None:
    """The verbs that look need the key as a restore does; without it they say what the manifest says, and why."""
    for name in ("a", "b"):
        image.push(real, LayoutRef(tmp_path / "layout", name), encrypt_to=to)
    place, key = f"oci:{tmp_path}/layout:a", ("--decrypt-key", str(identity))
    found = json.loads(cryoci("inspect", "--json", "--cmd", *key, place).stdout)
    assert found["complete"] and found["problems"] == []
    assert found["words"][0]["command"] == ["run", "--fast"] and len(found["processes"]) == 1
    plain = json.loads(cryoci("inspect", "--json", "--cmd", str(real)).stdout)
    assert found["processes"] == plain["processes"] and found["sizes"]["memory"] == plain["sizes"]["memory"]
    (shown,) = json.loads(cryoci("show", "--json", *key, place).stdout)
    assert shown["sizes"]["memory"] > 0
    words = ("memory", "--json", "--pid", "1", "--search", "secret")
    (match,) = json.loads(cryoci(*words, *key, place).stdout)["matches"]
    assert match["text"] == "secret"
    changes = json.loads(cryoci("diff", "--json", *key, place, f"oci:{tmp_path}/layout:b").stdout)["changes"]
    assert changes == []
    without = cryoci("inspect", place)
    assert without.exit_code == 0 and "--decrypt-key" in without.output and "secret" not in without.output
    assert "--decrypt-key" in cryoci("diff", place, place).stderr
    for refused in (cryoci(*words, place), cryoci("memory", place)):
        assert isinstance(refused.exception, TrustError) and "--decrypt-key" in (
            refused.exception.hint or ""
        )
    age.generate(tmp_path / "other.txt")
    wrong = cryoci("inspect", "--decrypt-key", str(tmp_path / "other.txt"), place)
    assert isinstance(wrong.exception, TrustError)


def test_without_a_key_nothing_is_fetched_or_left(
    proxy: Proxy, secret: Path, tmp_path: Path, to: Recipients
) -> None:
    place = reference.parse(f"{proxy.host}/seal/b:1")
    assert isinstance(place, RegistryRef)
    image.push(secret, place, encrypt_to=to)
    layers = image.inspect(place).layers
    age.generate(tmp_path / "wrong.txt")
    proxy.log.clear()
    for words, match in (
        ((), "no key was given"),
        (("--decrypt-key", str(tmp_path / "wrong.txt")), "none of the given keys opens"),
    ):
        result = cryoci("pull", *words, str(place), str(tmp_path / "out"))
        assert isinstance(result.exception, TrustError) and match in str(result.exception)
    assert not any(layer.digest in path for layer in layers for _, path in proxy.log)
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this node's keys are, not there yet."""
    monkeypatch.setattr(node, "PLACE", tmp_path / "decrypt")
    return tmp_path / "decrypt"


def test_a_nodes_own_keys(
    registry: str, secret: Path, tmp_path: Path, identity: Path, to: Recipients, own: Path
) -> None:
    """Engines cannot give a key: who restores for them (an annotated create) opens with what the node has."""
    place = f"{registry}/seal/own:1"
    target = reference.parse(place)
    assert isinstance(target, RegistryRef)
    pushed = image.push(secret, target, encrypt_to=to)
    age.generate(own / "wrong")
    assert own.stat().st_mode & 0o777 == 0o700
    with pytest.raises(TrustError, match="none of the given keys") as caught:
        fetch(place, tmp_path / "out", pod_namespace="team")
    assert "/etc/cryoci/decrypt" in (caught.value.hint or "") and not list(tmp_path.glob("*out*"))
    identity.rename(own / "mine")
    fetched = fetch(place, tmp_path / "out", pod_namespace="team")
    assert fetched.digest == pushed.digest and tree_of(tmp_path / "out") == tree_of(secret)
    assert cryoci("pull", place, str(tmp_path / "out2")).exit_code == 0
    assert tree_of(tmp_path / "out2") == tree_of(secret)
    # who only looks at an image of others is not refused for that
    assert json.loads(cryoci("inspect", "--json", place).stdout)["complete"] is False
    (own / "mine").chmod(0o640)
    with pytest.raises(ConfigError, match="others may read the key"):
        fetch(place, tmp_path / "out3")
    (own / "mine").unlink()
    (own / "wrong").unlink()
    with pytest.raises(TrustError, match="no key was given"):
        fetch(place, tmp_path / "out3")


def test_a_sealed_image_for_another_engine(
    secret: Path, tmp_path: Path, identity: Path, to: Recipients
) -> None:
    image.push(secret, LayoutRef(reference.default_store(), "c:1"), encrypt_to=to)
    words = ["c:1", "--to", "podman", "-o", str(tmp_path / "c.tar")]
    assert isinstance(cryoci("convert", *words).exception, TrustError) and not (tmp_path / "c.tar").exists()
    assert cryoci("convert", *words, "--decrypt-key", str(identity)).exit_code == 0
    assert SECRET in (tmp_path / "c.tar").read_bytes() and (tmp_path / "c.tar").stat().st_mode & 0o077 == 0


def test_several_recipients_of_both_kinds(
    registry: str, secret: Path, tmp_path: Path, identity: Path
) -> None:
    key, public = tmp_path / "rsa.pem", tmp_path / "rsa.pub"
    words = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(key)]
    subprocess.run(words, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    key.chmod(0o600)
    listed = tmp_path / "recipients"
    age.generate(tmp_path / "second.txt")
    lines = [f.read_text().splitlines()[0].split(": ")[1] for f in (identity, tmp_path / "second.txt")]
    listed.write_text("# the team\n" + "\n".join(lines) + "\n")
    place = reference.parse(f"{registry}/seal/many:1")
    assert isinstance(place, RegistryRef)
    image.push(secret, place, encrypt_to=Recipients.parse([str(listed), f"jwe:{public}"]))
    for number, file in enumerate((identity, tmp_path / "second.txt", key)):
        image.pull(place, tmp_path / f"out{number}", identities=Identities.load([file]))
        assert tree_of(tmp_path / f"out{number}") == tree_of(secret)


def test_the_age_program_opens_the_wrapped_key(secret: Path, tmp_path: Path, to: Recipients) -> None:
    ref = LayoutRef(tmp_path / "layout", "c")
    image.push(secret, ref, encrypt_to=to)
    wrapped = stores.resolve(Layout(ref.path), "c").manifest.layers[0].annotations[keyring.AGE_KEYS]
    words = [program("age"), "-d", "-i", str(tmp_path / "id.txt")]
    said = subprocess.run(words, input=base64.b64decode(wrapped), capture_output=True, check=True).stdout
    assert len(base64.b64decode(json.loads(said)["symkey"])) == 32


@pytest.fixture
def sealed(secret: Path, tmp_path: Path, to: Recipients) -> LayoutRef:
    ref = LayoutRef(tmp_path / "layout", "c")
    image.push(secret, ref, encrypt_to=to)
    return ref


def forge(ref: LayoutRef, change: Callable[[list[Descriptor], Layout], list[Descriptor]]) -> None:
    """Replace the image by one with changed layers and all digests right: the registry's owner can do that."""
    store = Layout(ref.path)
    found = stores.resolve(store, "c")
    layers = change(list(found.manifest.layers), store)
    config = json.loads(blob.read_small(store, found.manifest.config, 1 << 20))
    config["rootfs"]["diff_ids"] = [layer.digest for layer in layers]
    data = json.dumps(config).encode()
    described = Descriptor(found.manifest.config.media_type, digest_of(data), len(data))
    store.put_blob(blob.Bytes(data), described, lambda n: None)
    made = Manifest(described, layers, found.manifest.annotations).to_bytes()
    store.put_manifest(made, MANIFEST, "c")


def rewritten(layer: Descriptor, store: Layout, change: Callable[[bytes], bytes]) -> Descriptor:
    data = change(b"".join(store.open_blob(layer)))
    store.put_blob(blob.Bytes(data), None, lambda n: None)
    return replace(layer, digest=digest_of(data), size=len(data))


RECORD = stream.CHUNK + stream.TAG
ATTACKS: dict[str, Callable[[bytes], bytes]] = {
    "cut at a record": lambda data: data[:RECORD],
    "cut within": lambda data: data[:-5],
    "emptied": lambda data: b"",
    "first record gone": lambda data: data[RECORD:],
    "records exchanged": lambda data: data[RECORD : 2 * RECORD] + data[:RECORD] + data[2 * RECORD :],
    "record repeated": lambda data: data[:RECORD] + data,
    "one bit": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "more at the end": lambda data: data + b"x",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_altered_layers(sealed: LayoutRef, tmp_path: Path, identity: Path, attack: str) -> None:
    def change(layers: list[Descriptor], store: Layout) -> list[Descriptor]:
        assert layers[1].size > 3 * RECORD
        return [layers[0], rewritten(layers[1], store, ATTACKS[attack]), *layers[2:]]

    forge(sealed, change)
    with pytest.raises(IntegrityError, match="does not open at record"):
        image.pull(sealed, tmp_path / "out", identities=Identities.load([identity]))
    assert not list(tmp_path.glob(".out*")) and not (tmp_path / "out").exists()


def test_layers_cannot_be_exchanged_left_out_or_renamed(
    sealed: LayoutRef, tmp_path: Path, identity: Path
) -> None:
    original = Layout(sealed.path).get_manifest("c")

    def renamed(layers: list[Descriptor], store: Layout) -> list[Descriptor]:
        noted = {**layers[1].annotations, "io.cryoci.layer": "rootfs.tar"}
        return [layers[0], replace(layers[1], annotations=noted), *layers[2:]]

    def retyped(layers: list[Descriptor], store: Layout) -> list[Descriptor]:
        kind = layers[1].media_type.replace("+zstd", "+gzip")
        return [layers[0], replace(layers[1], media_type=kind), *layers[2:]]

    changes: list[Callable[[list[Descriptor], Layout], list[Descriptor]]] = [
        lambda layers, store: layers[:-1],
        lambda layers, store: [layers[1], layers[0], *layers[2:]],
        lambda layers, store: [*layers, layers[-1]],
        lambda layers, store: [
            layers[0],
            replace(layers[0], annotations=layers[1].annotations),
            *layers[2:],
        ],
        renamed,
        retyped,
    ]
    for change in changes:
        forge(sealed, change)
        with pytest.raises(IntegrityError):
            image.pull(sealed, tmp_path / "out", identities=Identities.load([identity]))
        Layout(sealed.path).put_manifest(original.data, original.media_type, "c")
    image.pull(sealed, tmp_path / "out", identities=Identities.load([identity]))


def test_layers_of_two_images_do_not_mix(
    sealed: LayoutRef, secret: Path, tmp_path: Path, identity: Path, to: Recipients
) -> None:
    image.push(secret, LayoutRef(sealed.path, "other"), encrypt_to=to)
    other = stores.resolve(Layout(sealed.path), "other").manifest.layers
    mine = stores.resolve(Layout(sealed.path), "c").manifest.layers
    assert {m.digest for m in mine}.isdisjoint(o.digest for o in other)
    forge(sealed, lambda layers, store: [layers[0], other[1], *layers[2:]])
    with pytest.raises(ImageError, match="put together"):
        image.pull(sealed, tmp_path / "out", identities=Identities.load([identity]))


def test_a_layer_in_the_clear_is_refused(
    sealed: LayoutRef, secret: Path, tmp_path: Path, identity: Path
) -> None:
    image.push(secret, LayoutRef(sealed.path, "clear"))
    clear = stores.resolve(Layout(sealed.path), "clear").manifest.layers
    forge(sealed, lambda layers, store: [layers[0], clear[1], *layers[2:]])
    with pytest.raises(ImageError, match="some are not"):
        image.pull(sealed, tmp_path / "out", identities=Identities.load([identity]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (keyring.PUBLIC_OPTIONS, None),
        (keyring.PUBLIC_OPTIONS, "%"),
        (keyring.PUBLIC_OPTIONS, base64.b64encode(b'{"cipher":"AES_256_CTR_HMAC_SHA256"}').decode()),
        (keyring.AGE_KEYS, None),
        (keyring.AGE_KEYS, "rubbish!"),
        (keyring.AGE_KEYS, base64.b64encode(b"age-encryption.org/v1\n").decode()),
    ],
)
def test_broken_annotations(
    sealed: LayoutRef, tmp_path: Path, identity: Path, key: str, value: str | None
) -> None:
    def change(layers: list[Descriptor], store: Layout) -> list[Descriptor]:
        changed = []
        for layer in layers:
            noted = {**layer.annotations, key: value or ""}
            if value is None:
                del noted[key]
            changed.append(replace(layer, annotations=noted))
        return changed

    forge(sealed, change)
    with pytest.raises(CryociError):
        image.pull(sealed, tmp_path / "out", identities=Identities.load([identity]))


def test_upload_that_breaks_goes_on_with_the_same_bytes(
    proxy: Proxy, secret: Path, tmp_path: Path, to: Recipients, identity: Path, no_sleep: list[float]
) -> None:
    proxy.cut = 2_500_000
    place = reference.parse(f"{proxy.host}/seal/resume:1")
    assert isinstance(place, RegistryRef)
    image.push(secret, place, encrypt_to=to)
    left: int | None = proxy.cut
    assert left is None
    image.pull(place, tmp_path / "out", identities=Identities.load([identity]))
    assert tree_of(tmp_path / "out") == tree_of(secret)


def test_a_key_never_meets_two_contents() -> None:
    sealer = stream.Sealer(bytes(32))
    first = b"".join(sealer.seal([b"a" * 3_000_000]))
    assert b"".join(sealer.seal([b"a" * 3_000_000])) == first
    with pytest.raises(ImageError, match="changed while"):
        list(sealer.seal([b"a" * 2_500_000 + b"b" * 500_000]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 * stream.CHUNK), st.lists(st.integers(1, 2 * stream.CHUNK), max_size=5))
def test_any_length_in_any_pieces(length: int, cuts: list[int]) -> None:
    data = os.urandom(length)

    def pieces() -> Iterator[bytes]:
        rest = data
        for cut in cuts:
            yield rest[:cut]
            rest = rest[cut:]
        yield rest

    sealed = b"".join(stream.Sealer(b"k" * 32).seal(pieces()))
    assert len(sealed) == length + stream.TAG * max(1, -(-length // stream.CHUNK))
    assert b"".join(stream.unseal(b"k" * 32, [sealed])) == data


def test_words_and_files_that_are_no_keys(tmp_path: Path, identity: Path, secret: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "empty").chmod(0o600)
    (tmp_path / "bad").write_text("AGE-SECRET-KEY-1QQQ\n")
    (tmp_path / "bad").chmod(0o600)
    for word in ("age1xyz", str(tmp_path / "missing"), str(tmp_path / "empty"), str(tmp_path / "bad")):
        with pytest.raises(CryociError):
            Recipients.parse([word])
    for name in ("empty", "bad", "missing"):
        with pytest.raises(CryociError) as caught:
            Identities.load([tmp_path / name])
        assert "QQQ" not in str(caught.value)
    identity.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        Identities.load([identity])
    with pytest.raises(CryociError) as caught:
        Identities.load([], f"sh -c 'cat {identity}; exit 3'")
    assert "SECRET" not in str(caught.value) and "status 3" in str(caught.value)
    assert "SECRET" not in repr(Identities.load([], f"cat {identity}"))
    image.push(secret, LayoutRef(tmp_path / "l", "x"))
    public = identity.read_text().splitlines()[0].split(": ")[1]
    refused = cryoci("push", "--encrypt-to", public, f"oci:{tmp_path}/l:x", f"oci:{tmp_path}/l:y")
    assert isinstance(refused.exception, UsageError)
