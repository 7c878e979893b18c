# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""ociimage/chunks.py: an image names the layers of an earlier one whose memory it has too, and is whole by itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import CryociError, ImageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import chunks, image, reference, stores
from cryoci.ociimage.manifest import Manifest
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.shim.memory import chain
from tests.unit import test_memory_chain as chunky
from tests.unit.images import checkpoint, make_checkpoint, no_credentials, registry, tree_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
NUMBERS = 12


def ref(text: str) -> LayoutRef | RegistryRef:
    found = reference.parse(text)
    assert isinstance(found, (LayoutRef, RegistryRef))
    return found


@pytest.fixture(params=["layout", "registry"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The front of a reference; append :NAME."""
    if request.param == "layout":
        return f"oci:{tmp_path}/layout"
    return f"{request.getfixturevalue('registry')}/team/{os.urandom(4).hex()}"


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as small as those of these tests are layers of their own."""
    monkeypatch.setattr("cryoci.ociimage.layers.BULK_SIZE", 1 << 14)


def with_memory(directory: Path, contents: dict[int, bytes]) -> Path:
    made = make_checkpoint(directory, pages=1000)
    inside = directory / "checkpoint"
    shutil.move(inside, directory / "criu")
    chunky.made(inside, contents)
    for file in (directory / "criu").iterdir():
        shutil.move(file, inside)
    (directory / "criu").rmdir()
    return made


def contents(changed: dict[int, bytes] | None = None) -> dict[int, bytes]:
    return {n: b"old-%d" % n for n in range(NUMBERS)} | (changed or {})


def manifest(place: str) -> Manifest:
    store = stores.open_store(ref(place))
    return stores.resolve(store, stores.source_name(ref(place), store)).manifest


@pytest.mark.usefixtures("small_layers")
def test_what_did_not_change_is_named_and_each_image_is_whole(place: str, tmp_path: Path) -> None:
    one = with_memory(tmp_path / "one", contents())
    two = with_memory(tmp_path / "two", contents({3: b"new"}))
    first = image.push(one, ref(f"{place}:1"))
    second = image.push(two, ref(f"{place}:2"), parent=chunks.parent(ref(f"{place}@{first.digest}")))
    old, new = manifest(f"{place}:1"), manifest(f"{place}:2")
    common = {layer.digest for layer in old.layers} & {layer.digest for layer in new.layers}
    held = [layer for layer in old.layers if families.LAYER_CHUNKS in layer.annotations]
    assert len(held) == NUMBERS
    assert len(common & {layer.digest for layer in held}) == NUMBERS - 1
    assert second.shared == sum(layer.size for layer in held if layer.digest in common)
    assert second.skipped >= second.shared > 0
    image.pull(ref(f"{place}:2"), tmp_path / "before")
    assert tree_of(tmp_path / "before") == tree_of(two)
    image.remove(ref(f"{place}@{first.digest}"))
    if place.startswith("oci:"):
        stores.open_store(ref(place)).collect()  # type: ignore[union-attr]
    image.pull(ref(f"{place}:2"), tmp_path / "after")
    assert tree_of(tmp_path / "after") == tree_of(two)
    # and a third on top of the second, whose layers are of both
    three = with_memory(tmp_path / "three", contents({3: b"new", 4: b"newer"}))
    third = image.push(three, ref(f"{place}:3"), parent=chunks.parent(ref(f"{place}:2")))
    assert (
        len({layer.digest for layer in new.layers} & {x.digest for x in manifest(f"{place}:3").layers}) >= 11
    )
    image.pull(ref(f"{place}:3"), tmp_path / "third")
    assert tree_of(tmp_path / "third") == tree_of(three)
    assert third.shared > 0


@pytest.mark.usefixtures("small_layers")
def test_another_repository_of_the_registry_mounts_and_another_store_writes(
    registry: str, tmp_path: Path
) -> None:
    one = with_memory(tmp_path / "one", contents())
    image.push(one, ref(f"{registry}/from/a:1"))
    above = chunks.parent(ref(f"{registry}/from/a:1"))
    beside = image.push(one, ref(f"{registry}/to/b:1"), parent=above)
    assert beside.shared > 0
    elsewhere = image.push(one, ref(f"oci:{tmp_path}/l:1"), parent=above)
    assert elsewhere.shared == 0
    for number, where in enumerate((f"{registry}/to/b:1", f"oci:{tmp_path}/l:1")):
        image.pull(ref(where), tmp_path / str(number))
        assert tree_of(tmp_path / str(number)) == tree_of(one)


@pytest.mark.usefixtures("small_layers")
def test_a_layer_that_is_gone_is_written_again(tmp_path: Path) -> None:
    one = with_memory(tmp_path / "one", contents())
    image.push(one, ref(f"oci:{tmp_path}/l:1"))
    above = chunks.parent(ref(f"oci:{tmp_path}/l:1"))
    gone = above.layers[0].descriptor
    (tmp_path / "l/blobs/sha256" / gone.digest[7:]).unlink()
    second = image.push(one, ref(f"oci:{tmp_path}/l:2"), parent=above)
    assert second.shared == sum(layer.descriptor.size for layer in above.layers[1:])
    image.pull(ref(f"oci:{tmp_path}/l:2"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(one)


def test_images_without_chunks_say_so(checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    assert "no memory" in chunks.parent(ref(f"oci:{tmp_path}/l:1")).problem


def test_a_directory_that_leans_on_another_becomes_no_image(tmp_path: Path) -> None:
    one = with_memory(tmp_path / "one", contents())
    two = with_memory(tmp_path / "two", contents({3: b"new"}))
    chain.thin(str(two / "checkpoint"), str(one / "checkpoint"))
    with pytest.raises(ImageError, match="must be whole") as caught:
        image.push(two, ref(f"oci:{tmp_path}/l:1"))
    assert "cryoci flatten" in (caught.value.hint or "")
    chain.flatten(str(two / "checkpoint"))
    image.push(two, ref(f"oci:{tmp_path}/l:1"))


@given(
    st.text(max_size=200) | st.from_regex(r"([0-9]{1,3}-[0-9a-f]{1,4}:[0-9a-f]{64},?){0,3}", fullmatch=True)
)
def test_an_annotation_names_chunks_or_nothing(text: str) -> None:
    for name, digest in chunks.parse(text).items():
        assert name.startswith(chunks.PREFIX) and "/" not in name[len(chunks.PREFIX) :]
        assert len(digest) == 64


@pytest.mark.parametrize(
    "text", ["1-a:x", "../../x:" + "0" * 64, "1-a:" + "0" * 64 + ",", ",", "1-a/b:" + "0" * 64]
)
def test_a_hostile_annotation_is_none(text: str) -> None:
    assert chunks.parse(text) == {}


@pytest.mark.parametrize(
    "entries", [3, [[]], [[1, "a", 1]], [[1, ["a"], 1, "0" * 64]], [[1, "../a", 1, "0" * 64]]]
)
def test_a_hostile_index_shares_nothing_or_is_refused(tmp_path: Path, entries: object) -> None:
    from cryoci.ociimage import archive

    one = with_memory(tmp_path / "one", {})
    (one / chunks.INDEX).write_text(json.dumps({"version": 1, "chunks": entries}))
    try:
        assert chunks.of(archive.validate(one)) == {}
    except CryociError:
        pass
