# SPDX-License-Identifier: Apache-2.0
"""Who restores a checkpoint of another engine, onto which base image, and what is said of it."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ImageError, NotFoundError, UnsupportedError
from cryoci.ociimage import blob
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import Descriptor, digest_of, dump
from cryoci.ociimage.reference import LayoutRef
from cryoci.shim import paths
from cryoci.shim.engines import engines_own
from cryoci.shim.engines.options import RestoreOptions
from cryoci.uses import base_image, foreign
from tests.unit import criu_images

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking is done in a chroot")
ID, DIGEST, MANIFEST = "ab" * 32, "sha256:" + "e" * 64, "application/vnd.oci.image.manifest.v1+json"
PINNED = f"registry.example/app@{DIGEST}"
Made = Callable[..., Path]

PODMAN = """#!/bin/sh
echo "$*" >>{base}/podman-calls
case "$*" in
    --runtime=cryoci-runtime*) exit {shim} ;;
    "image inspect"*) grep "^$5 " {base}/images | cut -d' ' -f2 | grep . ;;
    "pull"*) echo "$4 {id}" >>{base}/images; exit {pull} ;;
esac
"""


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a podman that has no image but those in the file `images`."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    monkeypatch.setenv("PATH", f"{bin_directory}:/usr/bin:/bin")
    (tmp_path / "images").touch()

    def install(*, shim: int = 0, pull: int = 0) -> Path:
        program = bin_directory / "podman"
        program.write_text(PODMAN.format(base=tmp_path, id=ID, shim=shim, pull=pull))
        program.chmod(0o755)
        return tmp_path / "images"

    return install


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A checkpoint of CRI-O or containerd."""

    def make(engine: str = "cri-o", *, mode: int = 0o555, **config: Any) -> Path:
        directory = criu_images.process(tmp_path / engine, memory={0x10000: b"x"})
        files = criu_images.image(
            "files",
            criu_images.message(f1=1, f2=8, f3=criu_images.message(f1=8, f6="/", f10=0o40555)),
            criu_images.message(f1=1, f2=9, f3=criu_images.message(f1=9, f6="/", f10=0o40000 | mode)),
        )
        criu_images.write(
            directory,
            inventory=criu_images.image("inventory", criu_images.message(f1=2)),
            pstree=criu_images.image("pstree", criu_images.message(f1=1)),
            files=files,
        )
        notes = (
            {"io.container.manager": "cri-o"}
            if engine == "cri-o"
            else {"io.kubernetes.cri.sandbox-name": "p"}
        )
        described = {
            "id": ID,
            "name": "k8s_app_pod_team_1_0",
            "rootfsImage": "registry.example/app:1",
            "rootfsImageName": PINNED,
            "rootfsImageRef": "cd" * 32 if engine == "cri-o" else PINNED,
            "runtime": "crun",
            **config,
        }
        (directory / "spec.dump").write_text(json.dumps({"annotations": notes, "linux": {"namespaces": []}}))
        (directory / "config.dump").write_text(json.dumps(described))
        return directory

    return make


def test_an_own_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "spec.dump").write_text('{"annotations": {"io.container.manager": "libpod"}}')
    adopted = foreign.adopt(tmp_path, RestoreOptions(), tmp_path)
    assert (adopted.directory, adopted.options.engine, adopted.notes) == (tmp_path, None, [])


def test_podman_comes_first(made: Made, podman: Made, tmp_path: Path) -> None:
    """The id of the archive is another node's, so the image is pulled by its digest."""
    images = podman()
    adopted = foreign.adopt(made(), RestoreOptions(), tmp_path)
    assert (adopted.options.engine, adopted.options.runtime) == ("podman", "cryoci-runtime")
    assert adopted.notes == ["made under CRI-O, restored under podman of this node"]
    assert images.read_text() == f"{PINNED} {ID}\n"
    config = json.loads((adopted.directory / "config.dump").read_text())
    assert (config["rootfsImageID"], config["rootfsImageName"]) == (ID, "registry.example/app")
    own = json.loads((adopted.directory / "cryoci.json").read_text())
    assert own["engine"] == "cri-o" and own["criu"] == {"file-locks": True}
    assert own["annotations"]["image.reference"] == PINNED


def test_an_image_that_is_here_is_not_pulled(made: Made, podman: Made, tmp_path: Path) -> None:
    podman(pull=1).write_text(f"{'cd' * 32} {'cd' * 32}\n")
    adopted = foreign.adopt(made(), RestoreOptions(), tmp_path)
    assert json.loads((adopted.directory / "config.dump").read_text())["rootfsImageID"] == "cd" * 32
    assert "pull" not in (tmp_path / "podman-calls").read_text()


def test_without_podman_its_maker(made: Made, podman: Made, tmp_path: Path) -> None:
    adopted = foreign.adopt(made(mode=0o755), RestoreOptions(), tmp_path)
    assert adopted.options.engine == "crun" and adopted.options.base is not None
    assert not (adopted.directory / "config.dump").exists()
    with pytest.raises(NotFoundError, match="could not be fetched") as caught:
        adopted.options.base(tmp_path / "root")
    assert "--bundle DIR" in str(caught.value.hint)


def test_what_was_asked_for_wins(made: Made, podman: Made, tmp_path: Path) -> None:
    podman()
    adopted = foreign.adopt(made("containerd"), RestoreOptions(engine="runc", name="x"), tmp_path)
    assert adopted.options.engine == "runc" and adopted.options.name == "x"
    assert adopted.notes == ["made under containerd, restored under runc of this node"]


@pytest.mark.parametrize("engine", ["podman", "runc"])
def test_a_pods_processes_are_not_to_be_had(made: Made, podman: Made, tmp_path: Path, engine: str) -> None:
    podman()
    directory = made()
    spec = json.loads((directory / "spec.dump").read_text())
    spec["linux"]["namespaces"] = ["?", {"type": "pid"}, {"type": "pid", "path": "/proc/7/ns/pid"}]
    (directory / "spec.dump").write_text(json.dumps(spec))
    with pytest.raises(UnsupportedError, match="shareProcessNamespace") as caught:
        foreign.adopt(directory, RestoreOptions(engine=engine), tmp_path)
    assert "io.cryoci.restore" in str(caught.value.hint)


@pytest.mark.parametrize("option", ["bundle", "root"])
def test_what_only_bare_runtimes_have(made: Made, podman: Made, tmp_path: Path, option: str) -> None:
    podman()
    options = RestoreOptions(bundle=tmp_path) if option == "bundle" else RestoreOptions(root=str(tmp_path))
    assert foreign.adopt(made(), options, tmp_path).options.engine == "crun"


def test_a_plain_runtime_and_another_mode(made: Made, podman: Made, tmp_path: Path) -> None:
    podman(shim=125)
    criu = tmp_path / "criu"
    criu.mkdir()
    directory = made(mode=0o755)

    def adopt(name: str) -> foreign.Adopted:
        (tmp_path / name).mkdir()
        return foreign.adopt(directory, RestoreOptions(), tmp_path / name, criu_configuration=criu)

    with pytest.raises(UnsupportedError, match=r"mode 755; podman makes it 555.* under crun") as caught:
        adopt("one")
    assert "cryoci install --engine podman" in str(caught.value.hint)
    (criu / "crun.conf").write_text("tcp-established\nskip-file-rwx-check\n")
    assert adopt("two").options.runtime == "crun"


@pytest.mark.parametrize(
    ("config", "pull", "said"),
    [
        ({"rootfsImageName": "", "rootfsImage": ""}, 0, "is not in podman's storage"),
        ({"rootfsImageName": "app:1", "rootfsImageRef": "app:1"}, 0, "does not say its digest"),
        ({}, 1, f"base image {PINNED} is not in podman's storage and could not be pulled"),
    ],
)
def test_no_base_image(made: Made, podman: Made, tmp_path: Path, config: Any, pull: int, said: str) -> None:
    podman(pull=pull)
    with pytest.raises(NotFoundError, match=said) as caught:
        foreign.adopt(made("containerd" if config else "cri-o", **config), RestoreOptions(), tmp_path)
    assert "podman pull" in str(caught.value.hint)


def test_an_image_by_name_alone_is_said(made: Made, podman: Made, tmp_path: Path) -> None:
    podman().write_text(f"app:1 {ID}\n")
    directory = made("containerd", rootfsImageName="app:1", rootfsImageRef="app:1")
    adopted = foreign.adopt(directory, RestoreOptions(), tmp_path)
    assert "app:1 of this node is taken for the base image" in adopted.notes[1]


# -- the base image of a bare container


def layer(**entries: bytes | None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as out:
        for name, data in entries.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            if data is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif data.startswith(b"->"):
                member.type, member.linkname = tarfile.SYMTYPE, data[2:].decode()
            else:
                member.size = len(data)
            out.addfile(member, io.BytesIO(data or b""))
    return packed.getvalue()


def image(path: Path, *layers: bytes) -> LayoutRef:
    layout = Layout(path, create=True)

    def put(kind: str, data: bytes) -> dict[str, Any]:
        stored = layout.put_blob(blob.Bytes(data), None, lambda n: None)
        return Descriptor(kind, stored.digest, stored.size).to_json()

    kinds = [(gzip.compress(data), "+gzip") if number else (data, "") for number, data in enumerate(layers)]
    described = [put(f"application/vnd.oci.image.layer.v1.tar{suffix}", data) for data, suffix in kinds]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": put("application/vnd.oci.image.config.v1+json", json.dumps(config).encode()),
        "layers": described,
    }
    with layout.session():
        layout.put_manifest(dump(manifest), MANIFEST, "base")
    return LayoutRef(path, "base")


@root_only
def test_layers_hide_what_is_below(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").touch()
    base = layer(
        etc=None, etc__old=b"1", var=None, var__a=b"1", var__b=b"1", link=b"->../outside", bin__sh=b"sh"
    )
    top = layer(
        etc__new=b"2",
        **{"etc__.wh.old": b"", "var__.wh..wh..opq": b"", "var__b": b"2", "link__.wh..wh..opq": b""},
    )
    base_image.fill(image(tmp_path / "layout", base, top), root, None)
    found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert found == {"etc/new": b"2", "var/b": b"2", "bin/sh": b"sh"}
    assert (tmp_path / "outside/kept").exists()


@root_only
def test_a_hostile_base_image_stays_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(ImageError):
        base_image.fill(image(tmp_path / "out", layer(**{"..__..__escaped": b"1"})), root, None)
    assert not (tmp_path / "escaped").exists()
    base_image.fill(image(tmp_path / "layout", layer(l=b"->/", l__in=b"1")), root, None)
    assert (root / "in").exists() and not Path("/in").exists()
    with pytest.raises(ImageError):
        base_image.fill(image(tmp_path / "bad", layer(**{"..__.wh...": b""})), root, None)
    with pytest.raises(ImageError):
        base_image.fill(image(tmp_path / "cut", layer(a=b"1")[:700]), root, None)


# -- what an engine gives


def test_places_of_an_engine(tmp_path: Path) -> None:
    places = ["/etc/hosts", "/etc/hostname", "/dev/shm", "/dev/termination-log", "/data"]
    spec: dict[str, Any] = {"hostname": "web", "linux": {"namespaces": []}}
    spec["mounts"] = [{"destination": p, "type": "bind", "source": "/theirs"} for p in places]
    spec["mounts"].append({"destination": "/run/secrets", "type": "tmpfs", "source": "tmpfs"})
    engines_own.provide(tmp_path, spec, {}, ExitStack())
    sources = {m["destination"]: m["source"] for m in spec["mounts"]}
    assert sources["/data"] == "/theirs" and sources["/run/secrets"] == "tmpfs"
    assert Path(sources["/etc/hosts"]).read_text().startswith("127.0.0.1 localhost web\n")
    assert Path(sources["/etc/hostname"]).read_text() == "web\n"
    assert Path(sources["/dev/shm"]).stat().st_mode & 0o7777 == 0o1777
    assert Path(sources["/dev/termination-log"]).read_bytes() == b""


def test_stand_ins_for_podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "empty_directory", lambda: str(tmp_path / "empty"))
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    places = ["/dev/termination-log", account, "/etc/hosts"]
    spec = {"mounts": [{"destination": p, "type": "bind", "source": "/theirs"} for p in places]}
    engines_own.stand_in(spec)
    assert [m["source"] for m in spec["mounts"]] == ["/dev/null", str(tmp_path / "empty"), "/theirs"]
    assert (tmp_path / "empty").is_dir()
