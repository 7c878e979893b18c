# SPDX-License-Identifier: Apache-2.0
"""One engine's archive in another's words; what a real engine makes of it is in tests/node/test_shelf.py."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConflictError, ImageError, UnsupportedError, UsageError
from cryoci.ociimage import conversion, dialects, image, rootfsdiff
from cryoci.ociimage.conversion import Wanted, convert_to_archive
from cryoci.ociimage.convert import convert
from cryoci.ociimage.descriptions import Base
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef
from tests.unit import criu_images
from tests.unit.images import no_credentials  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
ID, IMAGE_ID, DIGEST = "ab" * 32, "cd" * 32, "sha256:" + "e" * 64
BIND = {"destination": "/data", "type": "bind", "source": "/srv/data"}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


def tar_of(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def names_in(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


@pytest.fixture
def podman(tmp_path: Path) -> Path:
    """A directory as podman's archive unpacks to, with everything in it that podman writes."""
    directory = criu_images.process(tmp_path / "podman", memory={0x10000: b"x"})
    criu_images.write(
        directory,
        inventory=criu_images.image("inventory", criu_images.message(f1=2)),
        pstree=criu_images.image("pstree", criu_images.message(f1=1)),
    )
    (directory / "volumes").mkdir()
    config = {
        "id": ID,
        "name": "web",
        "rootfsImageID": IMAGE_ID,
        "rootfsImageName": f"docker.io/library/debian:trixie@{DIGEST}",
        "runtime": "runc",
        "createdTime": "2026-11-01T10:00:00.123Z",
        "checkpointedTime": "2026-11-01T11:00:00Z",
    }
    spec = {
        "annotations": {"io.container.manager": "libpod", "mine": "1"},
        "mounts": [BIND, {"destination": "/etc/hosts", "type": "bind", "source": "/run/hosts"}],
        "hooks": {"prestart": [{"path": "/bin/evil"}]},
        "linux": {"namespaces": [{"type": "network", "path": "/run/netns/x"}]},
    }
    files = {
        "config.dump": json.dumps(config).encode(),
        "spec.dump": json.dumps(spec).encode(),
        "network.status": b"{}",
        "ctr.log": b"log",
        "stats-dump": b"stats",
        "deleted.files": b'["/usr/bin/tac", "/etc/old"]',
        "rootfs-diff.tar": tar_of(etc__new=b"new", usr__bin__x=b"y"),
        "devshm-checkpoint.tar": tar_of(segment=b"shm"),
        "volumes/data.tar": tar_of(f=b"1"),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def to(source: Path, name: str, out: Path, base: Base | None = None) -> tuple[Path, set[str], list[str]]:
    done = convert(dialects.read(source), dialects.of(name), out, base=base)
    assert dialects.problems(dialects.read(out), dialects.of(name)) == []
    return out, {lost.what for lost in done.lost}, done.assumed


def load(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


def test_podman_to_containerd(podman: Path, tmp_path: Path) -> None:
    out, lost, assumed = to(podman, "containerd", tmp_path / "out")
    assert lost == {"network.status", "volumes/data.tar", "devshm-checkpoint.tar", "hooks of spec.dump"}
    config, spec = load(out, "config.dump"), load(out, "spec.dump")
    assert config["rootfsImageRef"] == f"docker.io/library/debian@{DIGEST}"
    assert (
        config["rootfsImageName"] == "docker.io/library/debian:trixie"
        and config["runtime"] == "io.containerd.runc.v2"
    )
    assert "io.container.manager" not in spec["annotations"] and spec["annotations"]["mine"] == "1"
    assert "hooks" not in spec and (out / "container.log").read_bytes() == b"log"
    layer = (out / "rootfs-diff.tar").read_bytes()
    assert names_in(gzip.decompress(layer)) == ["usr/bin/.wh.tac", "etc/.wh.old", "etc/new", "usr/bin/x"]
    status = load(out, "status.dump")
    assert status["metadata"] == {"name": "web"} and status["created_at"] == 1793527200 * 10**9
    assert any("/srv/data" in line for line in assumed) and not any("/etc/hosts" in line for line in assumed)


def test_there_and_back(podman: Path, tmp_path: Path) -> None:
    there, _, _ = to(podman, "containerd", tmp_path / "there")
    base = Base("docker.io/library/debian:trixie", IMAGE_ID, DIGEST)
    back, lost, _ = to(there, "podman", tmp_path / "back", base)
    assert load(back, "deleted.files") == load(podman, "deleted.files")
    assert (back / "rootfs-diff.tar").read_bytes()[:3072] == (podman / "rootfs-diff.tar").read_bytes()[:3072]
    assert (back / "ctr.log").read_bytes() == b"log" and load(back, "config.dump")["id"] == ID
    assert lost == {"status.dump"}
    for name in ("core-1.img", "pages-1.img", "inventory.img"):
        assert (back / "checkpoint" / name).read_bytes() == (podman / "checkpoint" / name).read_bytes()


def test_podman_to_crio_and_back(podman: Path, tmp_path: Path) -> None:
    there, lost, assumed = to(podman, "crio", tmp_path / "there")
    assert "volumes/data.tar" in lost and any("/data is a directory" in line for line in assumed)
    assert load(there, "config.dump")["rootfsImageRef"] == IMAGE_ID
    assert load(there, "spec.dump")["annotations"]["io.kubernetes.cri-o.Annotations"] == "{}"
    assert load(there, "bind.mounts")[0]["destination"] == "/data"
    assert (there / "io.kubernetes.cri-o.LogPath").read_bytes() == b"log"
    assert (there / "rootfs-diff.tar").read_bytes() == (podman / "rootfs-diff.tar").read_bytes()
    back, lost, _ = to(there, "podman", tmp_path / "back", Base("debian", IMAGE_ID))
    assert lost == {"bind.mounts"} and load(back, "config.dump")["rootfsImageName"] == "debian"


def test_podman_stays_podman(podman: Path, tmp_path: Path) -> None:
    out, lost, _ = to(podman, "podman", tmp_path / "out")
    assert lost == {"hooks of spec.dump"}
    assert {p.name for p in out.iterdir()} == {p.name for p in podman.iterdir()}


def test_bare_needs_a_base(podman: Path, tmp_path: Path) -> None:
    for name in ("rootfs-diff.tar", "deleted.files", "network.status", "devshm-checkpoint.tar"):
        (podman / name).unlink()
    (podman / "rootfs.tar").write_bytes(tar_of(bin__sh=b"sh"))
    (podman / "spec.dump").write_text("{}")
    (podman / "config.dump").write_text(json.dumps({"id": "box", "name": "box", "runtime": "runc"}))
    own = {"version": 1, "engine": "runc", "criu": {"tcp-established": True}}
    (podman / "cryoci.json").write_text(json.dumps(own))
    for name in ("podman", "crio", "containerd"):
        with pytest.raises(UsageError, match="base image"):
            convert(dialects.read(podman), dialects.of(name), tmp_path / f"no-{name}")
    with pytest.raises(UsageError, match="id"):
        convert(dialects.read(podman), dialects.PODMAN, tmp_path / "no-id", base=Base("debian"))
    out, lost, assumed = to(podman, "podman", tmp_path / "out", Base("debian", IMAGE_ID))
    config = load(out, "config.dump")
    assert len(config["id"]) == 64 and config["networkMode"] == "host" and "--tcp-established" in lost
    assert names_in((out / "rootfs-diff.tar").read_bytes()) == ["bin/sh"]
    assert any("lies over the base image" in line for line in assumed)


def test_incremental_stays_with_podman(podman: Path, tmp_path: Path) -> None:
    (podman / "pre-checkpoint").mkdir()
    (podman / "checkpoint/parent").symlink_to("../pre-checkpoint")
    with pytest.raises(UnsupportedError, match="incremental"):
        convert(dialects.read(podman), dialects.CRIO, tmp_path / "out")
    out, _, _ = to(podman, "podman", tmp_path / "same")
    assert (out / "checkpoint/parent").is_symlink()


def test_archives(podman: Path, tmp_path: Path) -> None:
    wanted = Wanted("crio", tmp_path / "out.tar")
    done = convert_to_archive(DirectoryRef(podman), wanted)
    assert done.path.stat().st_size == done.size and done.lost
    with pytest.raises(ConflictError):
        convert_to_archive(DirectoryRef(podman), wanted)
    with pytest.raises(UnsupportedError, match="volumes/data"):
        convert_to_archive(DirectoryRef(podman), Wanted("crio", tmp_path / "no.tar", strict=True))
    with pytest.raises(UsageError, match="needs its name"):
        convert_to_archive(DirectoryRef(podman), Wanted("crio", tmp_path / "no.tar", base_id=IMAGE_ID))
    assert not (tmp_path / "no.tar").exists()
    pulled = image.pull(ArchiveRef(tmp_path / "out.tar"), tmp_path / "out")
    assert pulled.checkpoint.facts["engine.name"] == "cri-o"


def test_ctr_and_back(podman: Path, tmp_path: Path) -> None:
    done = convert_to_archive(DirectoryRef(podman), Wanted(conversion.CTR, tmp_path / "ctr.tar"))
    assert any("/run/netns/x" in line for line in done.assumed)
    pulled = image.pull(ArchiveRef(tmp_path / "ctr.tar"), tmp_path / "out")
    assert pulled.checkpoint.facts["engine.name"] == "containerd"
    assert load(tmp_path / "out", "spec.dump")["root"] == {"path": "rootfs"}
    for name in ("core-1.img", "pages-1.img"):
        assert (tmp_path / "out/checkpoint" / name).read_bytes() == (
            podman / "checkpoint" / name
        ).read_bytes()
    model = dialects.read(tmp_path / "out")
    assert model.dialect is dialects.CONTAINERD and model.text("name") == "web"


@pytest.mark.parametrize(
    "deleted", ['["/a/../../etc"]', '["/"]', "{}", "[1]", '["a\\u0000b"]', "[", '["/' + "x" * 5000 + '"]']
)
def test_hostile_deletions(podman: Path, tmp_path: Path, deleted: str) -> None:
    (podman / "deleted.files").write_text(deleted)
    with pytest.raises(ImageError):
        convert(dialects.read(podman), dialects.CONTAINERD, tmp_path / "out")


def test_hostile_whiteouts(tmp_path: Path) -> None:
    for name in ("../.wh.x", "a/.wh...", ".wh.."):
        layer = tmp_path / "layer"
        layer.write_bytes(gzip.compress(tar_of(**{name: b""})))
        with pytest.raises(ImageError):
            rootfsdiff.from_layer(layer, tmp_path / "out.tar")
        assert not (tmp_path / "out.tar").exists()


def test_opaque_directories(podman: Path, tmp_path: Path) -> None:
    """A file, then a directory of that name, clear it in the other form; the root cannot be said, and is told."""
    there, _, _ = to(podman, "containerd", tmp_path / "there")
    (there / "rootfs-diff.tar").unlink()
    (there / "rootfs-diff.tar").write_bytes(
        gzip.compress(tar_of(**{"var__.wh..wh..opq": b"", "var__x": b"1"}))
    )
    back, lost, _ = to(there, "podman", tmp_path / "back", Base("debian", IMAGE_ID))
    assert "/var" not in lost and not (back / "deleted.files").exists()
    assert names_in((back / "rootfs-diff.tar").read_bytes()) == ["var", "var", "var/x"]
    (there / "rootfs-diff.tar").unlink()
    (there / "rootfs-diff.tar").write_bytes(gzip.compress(tar_of(**{".wh..wh..opq": b"", "var__x": b"1"})))
    _, lost, _ = to(there, "podman", tmp_path / "again", Base("debian", IMAGE_ID))
    assert "/" in lost


def test_what_gnu_tar_writes_passes_as_it_is(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ("n" * 180)).write_bytes(b"long")
    (tree / "link").symlink_to("t" * 150)
    with open(tree / "sparse", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    for form in ("posix", "gnu"):
        sparse = ["--sparse"] if form == "posix" else []
        argv = ["tar", "-C", str(tree), f"--format={form}", *sparse, "-cf", str(tmp_path / "in.tar"), "."]
        subprocess.run(argv, check=True)
        out = tmp_path / f"{form}.tar"
        assert rootfsdiff.from_layer(tmp_path / "in.tar", out) == ([], False)
        listed = subprocess.run(["tar", "-tvf", str(out)], check=True, capture_output=True).stdout
        assert (
            listed
            == subprocess.run(
                ["tar", "-tvf", str(tmp_path / "in.tar")], check=True, capture_output=True
            ).stdout
        )
