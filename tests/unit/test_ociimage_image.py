# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Push, pull, copy, inspect, list and remove, over a layout and a real registry."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tarfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cryoci.errors import ConflictError, ImageError, IntegrityError, NotFoundError, RegistryError, UsageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import image, layers, reference
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import Descriptor, Index, Manifest
from cryoci.ociimage.reference import ArchiveRef, LayoutRef, RegistryRef

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from tests.unit.images import (  # noqa: F401
    PAGES,
    Proxy,
    checkpoint,
    make_checkpoint,
    no_credentials,
    no_sleep,
    proxy,
    registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials")


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


@pytest.mark.parametrize("compression", ["zstd:1", "gzip:1", "none"])
def test_round_trip(place: str, checkpoint: Path, tmp_path: Path, compression: str) -> None:
    pushed = image.push(checkpoint, ref(f"{place}:1"), compression=compression)
    pulled = image.pull(ref(f"{place}:1"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert pulled.digest == pushed.digest and pulled.raw_size == pushed.raw_size
    assert pulled.checkpoint.path == tmp_path / "out"
    assert oct((tmp_path / "out").stat().st_mode)[-3:] == "700"
    assert oct((tmp_path / "out/config.dump").stat().st_mode)[-3:] == "600"


def test_pull_by_digest_and_the_only_image(place: str, checkpoint: Path, tmp_path: Path) -> None:
    pushed = image.push(checkpoint, ref(f"{place}:1"))
    image.pull(ref(f"{place}@{pushed.digest}"), tmp_path / "a")
    image.pull(ref(f"{place}@{pushed.manifest_digest}"), tmp_path / "b")
    assert tree_of(tmp_path / "a") == tree_of(tmp_path / "b") == tree_of(checkpoint)
    if place.startswith("oci:"):
        image.pull(ref(place), tmp_path / "c")


def test_same_directory_same_digest(registry: str, checkpoint: Path, tmp_path: Path) -> None:
    again = make_checkpoint(tmp_path / "again")
    os.utime(again / "config.dump", (1, 1))
    first = image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    second = image.push(again, ref(f"{registry}/team/same:1"))
    assert (first.digest, first.manifest_digest, first.size) == (
        second.digest,
        second.manifest_digest,
        second.size,
    )
    third = image.push(again, ref(f"oci:{tmp_path}/l:2"))
    assert third.digest == first.digest and third.skipped > 0


def test_image_shape(checkpoint: Path, tmp_path: Path) -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    given = {"gpu.driver": "580.1", "com.example.x": "y", "org.criu.checkpoint.pod.name": "p"}
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"), created=when, annotations=given)
    store = Layout(tmp_path / "l")
    index = json.loads(store.get_manifest("1").data)
    manifest = json.loads(store.get_manifest(index["manifests"][0]["digest"]).data)
    entry = json.loads((tmp_path / "l/index.json").read_text())["manifests"][0]
    config = json.loads((tmp_path / "l/blobs/sha256" / manifest["config"]["digest"][7:]).read_bytes())
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert "artifactType" not in manifest and "artifactType" not in index
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert (
        config["os"] == "linux"
        and config["architecture"] == index["manifests"][0]["platform"]["architecture"]
    )
    assert config["created"] == "2026-01-02T03:04:05Z"
    assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == len(config["history"]) == 4
    for noted in (manifest["annotations"], index["annotations"], entry["annotations"]):
        assert noted["io.kubernetes.cri-o.annotations.checkpoint.name"] == "counter"
        assert noted["io.podman.annotations.checkpoint.runtime.name"] == "runc"
        assert noted["io.podman.annotations.checkpoint.criu.version"] == "40101"
        assert noted["org.criu.checkpoint.container.name"] == "counter"
        assert noted["org.criu.checkpoint.criu.version"] == "4.1.1"
        assert noted["org.criu.checkpoint.pod.name"] == "p"
        assert noted["io.cryoci.gpu.driver"] == "580.1"
    titles = [layer["annotations"]["io.cryoci.layer"] for layer in manifest["layers"]]
    assert titles == ["metadata", "checkpoint/pages-1.img", "rootfs-diff.tar", "volumes/data.tar"]
    assert all(layer["mediaType"].endswith(".tar+zstd") for layer in manifest["layers"])
    blob = (tmp_path / "l/blobs/sha256" / manifest["layers"][1]["digest"][7:]).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(zstd.decompress(blob))) as tar:
        members = [(m.name, m.mode, m.uid, m.gid, m.mtime, m.size) for m in tar]
    assert members == [("checkpoint", 0o700, 0, 0, 0, 0), ("checkpoint/pages-1.img", 0o600, 0, 0, 0, PAGES)]


def test_layer_frames_carry_their_size(checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    info = image.inspect(ref(f"oci:{tmp_path}/l:1"))
    data = (tmp_path / "l/blobs/sha256" / info.layers[1].digest[7:]).read_bytes()
    sizes = []
    while data:
        sizes.append(zstd.get_frame_info(data).decompressed_size)
        data = data[zstd.get_frame_size(data) :]
    assert len(sizes) == 5 and sum(sizes) == info.layers[1].raw_size and sizes[0] == layers.FRAME


def test_inspect_reads_no_memory(proxy: Proxy, checkpoint: Path) -> None:
    image.push(checkpoint, ref(f"{proxy.host}/team/inspect:1"))
    proxy.log.clear()
    info = image.inspect(ref(f"{proxy.host}/team/inspect:1"))
    assert (info.engine, info.container_name, info.criu_version) == ("podman", "counter", "4.1.1")
    assert (info.base_image, info.base_digest) == ("docker.io/library/debian:trixie", "sha256:" + "e" * 64)
    assert info.raw_size == sum(len(data) for data in tree_of(checkpoint).values())
    fetched = [path.rpartition("/")[2] for method, path in proxy.log if "/blobs/" in path]
    assert info.layers[0].digest in fetched and info.layers[1].digest not in fetched


def test_list(place: str, checkpoint: Path) -> None:
    pushed = image.push(checkpoint, ref(f"{place}:1"))
    image.push(checkpoint, ref(f"{place}:2"), annotations={"container.name": "other"})
    found = image.list_images(ref(place))
    assert [(e.name, e.container_name, e.engine) for e in found] == [
        ("1", "counter", "podman"),
        ("2", "other", "podman"),
    ]
    assert found[0].digest == pushed.digest and found[0].raw_size == pushed.raw_size and not found[0].problem


def test_list_of_no_store_is_empty(tmp_path: Path) -> None:
    assert image.list_images(LayoutRef(tmp_path / "none")) == []


def test_copy_keeps_digests_and_skips(registry: str, checkpoint: Path, tmp_path: Path) -> None:
    name = f"{registry}/team/copy"
    pushed = image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    up = image.copy(ref(f"oci:{tmp_path}/l:1"), ref(f"{name}:1"))
    assert (up.digest, up.skipped) == (pushed.digest, 0)
    again = image.copy(ref(f"oci:{tmp_path}/l:1"), ref(f"{name}:2"))
    assert again.skipped == again.size == up.size
    down = image.copy(ref(f"{name}:1"), ref(f"oci:{tmp_path}/m:1"))
    assert down.digest == pushed.digest
    image.pull(ref(f"oci:{tmp_path}/m:1"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)


def test_remove_from_layout_frees_only_what_is_unneeded(checkpoint: Path, tmp_path: Path) -> None:
    place = f"oci:{tmp_path}/l"
    image.push(checkpoint, ref(f"{place}:1"))
    image.push(checkpoint, ref(f"{place}:2"), annotations={"x": "y"})
    freed = image.remove(ref(f"{place}:1"))
    assert 0 < freed < 20_000  # two manifests; layers are shared
    image.pull(ref(f"{place}:2"), tmp_path / "out")
    assert image.remove(ref(f"{place}:2")) > 5 << 20
    assert list((tmp_path / "l/blobs/sha256").iterdir()) == []
    with pytest.raises(NotFoundError):
        image.remove(ref(f"{place}:2"))


def test_collection_waits_for_writers(checkpoint: Path, tmp_path: Path) -> None:
    place = f"oci:{tmp_path}/l"
    image.push(checkpoint, ref(f"{place}:1"))
    store = Layout(tmp_path / "l")
    with store.session():
        assert image.remove(ref(f"{place}:1")) == 0
    assert store.collect() > 5 << 20


def test_remove_from_registry(registry: str, checkpoint: Path) -> None:
    name = f"{registry}/team/remove"
    pushed = image.push(checkpoint, ref(f"{name}:1"))
    image.push(checkpoint, ref(f"{name}:2"))
    with pytest.raises(ConflictError, match="2 lead to the same"):
        image.remove(ref(f"{name}:1"))
    assert image.remove(ref(f"{name}@{pushed.digest}")) == 0
    with pytest.raises(NotFoundError):
        image.inspect(ref(f"{name}:1"))


def test_pull_refuses_a_taken_name(checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConflictError):
        image.pull(ref(f"oci:{tmp_path}/l:1"), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("which", [0, 1, 2, 3, "config", "manifest"])
@pytest.mark.parametrize("how", ["flip", "cut", "grow"])
def test_altered_blob_in_layout(checkpoint: Path, tmp_path: Path, which: int | str, how: str) -> None:
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    store = Layout(tmp_path / "l")
    inner = Index.parse(store.get_manifest("1").data).manifests[0]
    manifest = Manifest.parse(store.get_manifest(inner.digest).data)
    parts: dict[int | str, Descriptor] = {"config": manifest.config, "manifest": inner}
    parts.update(enumerate(manifest.layers))
    file = tmp_path / "l/blobs/sha256" / parts[which].digest[7:]
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    if how == "flip":
        data[middle] ^= 1
    file.write_bytes(bytes(data[:middle] if how == "cut" else data + b"\0" if how == "grow" else data))
    before = set(os.listdir(tmp_path))
    with pytest.raises(ImageError):
        image.pull(ref(f"oci:{tmp_path}/l:1"), tmp_path / "out")
    assert set(os.listdir(tmp_path)) == before
    if not (which == "manifest" and how != "flip"):
        with pytest.raises(ImageError):
            image.copy(ref(f"oci:{tmp_path}/l:1"), ref(f"oci:{tmp_path}/m:1"))
        assert image.list_images(LayoutRef(tmp_path / "m")) == []


@pytest.mark.parametrize("how", ["flip", "cut", "grow"])
def test_registry_that_alters_blobs(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, how: str, no_sleep: list[float]
) -> None:
    image.push(checkpoint, ref(f"{proxy.host}/team/altered:1"))
    big = image.inspect(ref(f"{proxy.host}/team/altered:1")).layers[1].digest

    def alter(request: object, data: bytes) -> bytes:
        if big not in getattr(request, "path", ""):
            return data
        middle = len(data) // 2
        if how == "flip":
            return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return data[:middle] if how == "cut" else data + b"\0"

    proxy.body = alter
    before = set(os.listdir(tmp_path))
    with pytest.raises((IntegrityError, ImageError, RegistryError)):
        image.pull(ref(f"{proxy.host}/team/altered:1"), tmp_path / "out")
    with pytest.raises((IntegrityError, RegistryError)):
        image.copy(ref(f"{proxy.host}/team/altered:1"), ref(f"oci:{tmp_path}/m:1"))
    assert set(os.listdir(tmp_path)) - before == {"m"}
    assert image.list_images(LayoutRef(tmp_path / "m")) == []
    assert list((tmp_path / "m/blobs/sha256").iterdir()) == []


def test_registry_that_alters_the_manifest(proxy: Proxy, checkpoint: Path, tmp_path: Path) -> None:
    pushed = image.push(checkpoint, ref(f"{proxy.host}/team/manifest:1"))
    proxy.body = lambda request, data: (
        data.replace(b"counter", b"kounter") if "/manifests/" in request.path else data
    )
    with pytest.raises(IntegrityError):
        image.pull(ref(f"{proxy.host}/team/manifest@{pushed.digest}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_push_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Layout, data: bytes, media_type: str, name: str | None) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Layout, "put_manifest", refuse)
    with pytest.raises(OSError):
        image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    assert list((tmp_path / "l/blobs/sha256").iterdir()) == []
    assert image.list_images(LayoutRef(tmp_path / "l")) == []


def test_file_that_changes_while_it_is_packed(checkpoint: Path, tmp_path: Path) -> None:
    class Shrink:
        def start(self, name: str, total: int | None) -> object:
            if name.endswith("pages-1.img"):
                os.truncate(checkpoint / "checkpoint/pages-1.img", 100)
            return None

        def advance(self, token: object, n: int) -> None:
            pass

        def done(self, token: object) -> None:
            pass

    with pytest.raises(ImageError, match="changed its size"):
        image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"), progress=Shrink())
    assert image.list_images(LayoutRef(tmp_path / "l")) == []


def test_progress_adds_up(place: str, checkpoint: Path, tmp_path: Path) -> None:
    class Count:
        def __init__(self) -> None:
            self.lock, self.total, self.seen, self.left = threading.Lock(), 0, 0, 0

        def start(self, name: str, total: int | None) -> object:
            with self.lock:
                self.total += total or 0
                self.left += 1
            return name

        def advance(self, token: object, n: int) -> None:
            with self.lock:
                self.seen += n

        def done(self, token: object) -> None:
            with self.lock:
                self.left -= 1

    for action in (
        lambda count: image.push(checkpoint, ref(f"{place}:1"), progress=count),
        lambda count: image.pull(ref(f"{place}:1"), tmp_path / "out", progress=count),
        lambda count: image.copy(ref(f"{place}:1"), ref(f"oci:{tmp_path}/m:1"), progress=count),
    ):
        count = Count()
        action(count)
        assert count.seen == count.total > 0 and count.left == 0


@pytest.mark.parametrize("codec", ["", "gz", "zst"])
def test_engine_archive(checkpoint: Path, tmp_path: Path, codec: str) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(checkpoint, ".")
    data = packed.getvalue()
    if codec:
        data = gzip.compress(data) if codec == "gz" else zstd.compress(data)
    file = tmp_path / "export.tar"
    file.write_bytes(data)
    pulled = image.pull(ArchiveRef(file), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert pulled.annotations["org.criu.checkpoint.engine.name"] == "podman"
    for cut in (len(data) // 3, len(data) - 20 if codec else len(data) // 2, 1):
        file.write_bytes(data[:cut])
        with pytest.raises(ImageError):
            image.pull(ArchiveRef(file), tmp_path / "cut")
        assert not (tmp_path / "cut").exists()


def test_podmans_parent_link_travels(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "pre-checkpoint").mkdir()
    (checkpoint / "pre-checkpoint/inventory.img").write_bytes(b"x")
    os.symlink("../pre-checkpoint", checkpoint / "checkpoint/parent")
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    image.pull(ref(f"oci:{tmp_path}/l:1"), tmp_path / "out")
    assert os.readlink(tmp_path / "out/checkpoint/parent") == "../pre-checkpoint"


def test_image_without_checkpoint_annotations(checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    store = Layout(tmp_path / "l")
    inner = Index.parse(store.get_manifest("1").data).manifests[0]
    bare = Manifest.parse(store.get_manifest(inner.digest).data)
    store.put_manifest(Manifest(bare.config, bare.layers, {}).to_bytes(), inner.media_type, "bare")
    with pytest.raises(ImageError, match="not of a checkpoint"):
        image.pull(ref(f"oci:{tmp_path}/l:bare"), tmp_path / "out")
    assert [e.problem for e in image.list_images(ref(f"oci:{tmp_path}/l"))] == ["", "not a checkpoint"]


def test_layer_that_outgrows_its_claim(checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    store = Layout(tmp_path / "l")
    inner = Index.parse(store.get_manifest("1").data).manifests[0]
    true = Manifest.parse(store.get_manifest(inner.digest).data)
    lying = [
        type(d)(d.media_type, d.digest, d.size, {**d.annotations, families.LAYER_RAW_SIZE: "4096"})
        for d in true.layers
    ]
    store.put_manifest(Manifest(true.config, lying, true.annotations).to_bytes(), inner.media_type, "lie")
    with pytest.raises(ImageError, match="more than the 4096 bytes"):
        image.pull(ref(f"oci:{tmp_path}/l:lie"), tmp_path / "out")


def test_writing_to_a_digest_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        image.push(checkpoint, ref(f"oci:{tmp_path}/l@sha256:{'0' * 64}"))


def test_many_processes_push_to_one_layout(checkpoint: Path, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def push(name: str) -> None:
        try:
            image.push(checkpoint, ref(f"oci:{tmp_path}/l:{name}"), annotations={"who": name})
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=push, args=(f"n{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [e.name for e in image.list_images(ref(f"oci:{tmp_path}/l"))] == ["n0", "n1", "n2", "n3"]


def test_failure_of_one_layer_stops_the_others(checkpoint: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(NotFoundError):
        image.pull(ref(f"oci:{tmp_path}/none:1"), tmp_path / "out")
    os.chmod(checkpoint, 0o700)
    os.rename(checkpoint / "rootfs-diff.tar", checkpoint / "unknown.tar")
    with pytest.raises(ImageError, match="no place in a checkpoint"):
        image.push(checkpoint, ref(f"oci:{tmp_path}/l:1"))
    assert time.monotonic() - began < 5
