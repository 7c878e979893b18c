# SPDX-License-Identifier: Apache-2.0
"""AMD: this node's render nodes in the /dev that CRIU will unpack; GNU tar reads it as CRIU has it read."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import UnsupportedError
from cryoci.shim import operation, restore
from cryoci.shim.argv import parse
from cryoci.shim.gpu import amd, amd_nodes, kfd
from tests.unit.fake_runtime import FakeNode
from tests.unit.test_gpu_amd import tree

D128, D129, D140 = (f"/dev/dri/renderD{n}" for n in (128, 129, 140))
Spec = dict[str, Any]


def device(name: str, minor: int, major: int = 226) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, major, minor
    info.mode, info.uid, info.gid = 0o660, 0, 993
    return info


def folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o750
    return info


def dumped(images: Path, number: int, *members: tarfile.TarInfo) -> Path:
    """A tmpfs as CRIU dumps it."""
    images.mkdir(exist_ok=True)
    path = images / f"tmpfs-dev-{number}.tar.gz.img"
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as tar:
        for member in (folder("."), *members):
            tar.addfile(member, io.BytesIO())
    path.chmod(0o640)
    return path


def unpacked(image: Path, to: Path) -> dict[str, tuple[int, int, int, int]]:
    """What CRIU's own call of tar makes of it: path -> type, mode, group, minor."""
    to.mkdir()
    argv = ["tar", "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory", str(to)]
    with open(image, "rb") as f:
        subprocess.run(argv, stdin=f, check=True)
    found = {}
    for path in sorted(to.rglob("*")):
        info = path.lstat()
        mode = stat.S_IMODE(info.st_mode)
        found[str(path.relative_to(to))] = (
            stat.S_IFMT(info.st_mode),
            mode,
            info.st_gid,
            os.minor(info.st_rdev),
        )
    return found


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")


@needs_root
def test_the_node_is_there_before_the_files(tmp_path: Path) -> None:
    """From two captured topologies to the /dev that the plugin opens; afterwards the image is as it was."""
    images = tmp_path / "images"
    dumped(images, 40, folder("./shm"))
    image = dumped(images, 41, device("./null", 3, 1), folder("./dri"), device("./dri/renderD128", 128))
    before = image.read_bytes()
    topology = kfd.capture(tree(tmp_path / "there", {}))
    (images / amd.TOPOLOGY).write_text(json.dumps(topology))
    here = tree(tmp_path / "here", {"drm_render_minor": 140})
    moved = amd.compare(str(images), amd.AmdOptions(), here)
    assert moved is not None
    with amd_nodes.provided(str(images), {}, moved) as added:
        assert added == [D140] and stat.S_IMODE(image.stat().st_mode) == 0o640
        assert unpacked(image, tmp_path / "dev") == {
            "dri": (stat.S_IFDIR, 0o750, 0, 0),
            "dri/renderD128": (stat.S_IFCHR, 0o660, 993, 128),
            "dri/renderD140": (stat.S_IFCHR, 0o660, 993, 140),
            "null": (stat.S_IFCHR, 0o660, 993, 3),
        }
    assert image.read_bytes() == before
    assert sorted(os.listdir(images)) == [amd.TOPOLOGY, "tmpfs-dev-40.tar.gz.img", image.name]


@needs_root
def test_two_that_change_places_and_what_only_has_the_name(tmp_path: Path) -> None:
    both = (folder("./dri"), device("./dri/renderD128", 128), device("./dri/renderD129", 129))
    dumped(tmp_path / "a", 1, *both)
    with amd_nodes.provided(str(tmp_path / "a"), {}, {D128: D129, D129: D128}) as added:
        assert added == []  # the plugin opens each by this node's number
    file = tarfile.TarInfo("./dri/renderD129")
    image = dumped(tmp_path / "b", 1, folder("./dri"), device("./dri/renderD128", 128), file)
    with amd_nodes.provided(str(tmp_path / "b"), {}, {D128: D129}) as added:
        assert added == [D129]
        # what the archive itself has under that name comes later, and is the container's own affair
        assert unpacked(image, tmp_path / "dev")["dri/renderD129"][0] == stat.S_IFREG


def test_nothing_to_do(tmp_path: Path) -> None:
    """No /dev/dri in a tmpfs (the host's is bound), the same numbers, images that nobody can read."""
    images = tmp_path / "images"
    image = dumped(images, 1, folder("./shm"))
    (images / "tmpfs-dev-2.tar.gz.img").write_bytes(b"no archive")
    (images / "tmpfs-dev-3.tar.gz.img").write_bytes(image.read_bytes()[:40])
    (images / "tmpfs-dev-4.tar.gz.img").symlink_to("/dev/zero")
    for moved in ({}, {D128: D140}):
        with amd_nodes.provided(str(images), {}, moved) as added:
            assert added == []
    same = dumped(images, 5, folder("./dri"), device("./dri/renderD128", 128))
    with amd_nodes.provided(str(images), {}, {D128: D128}) as added:
        assert added == []
    assert not list(images.glob("*.cryoci-orig")) and same.exists()


def test_a_restore_that_was_killed(tmp_path: Path) -> None:
    """The next one begins with the image that CRIU had made."""
    image = dumped(tmp_path, 1, folder("./dri"), device("./dri/renderD128", 128))
    before = image.read_bytes()
    with amd_nodes.provided(str(tmp_path), {}, {D128: D140}):
        os.link(f"{image}{amd_nodes.ORIGINAL}", tmp_path / "kept")
        changed = image.read_bytes()
    image.unlink()
    image.write_bytes(changed)
    os.rename(tmp_path / "kept", f"{image}{amd_nodes.ORIGINAL}")
    with amd_nodes.provided(str(tmp_path), {}, {D128: D128}) as added:
        assert added == [] and image.read_bytes() == before


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = dumped(tmp_path, 1, folder("./dri"), device("./dri/renderD128", 128))
    before = image.read_bytes()
    spec: Spec = {"linux": {"devices": [{"path": "/dev/kfd"}, {"path": D129}]}}
    with (
        pytest.raises(
            UnsupportedError, match=r"go to /dev/dri/renderD140 here.*is given /dev/dri/renderD129"
        ),
        amd_nodes.provided(str(tmp_path), spec, {D128: D140}),
    ):
        pass

    def full(path: str, data: bytes, *, mode: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(amd_nodes, "write_atomic", full)
    with (
        pytest.raises(UnsupportedError, match="cannot be changed for them: No space"),
        amd_nodes.provided(str(tmp_path), {}, {D128: D140}),
    ):
        pass
    assert image.read_bytes() == before and os.listdir(tmp_path) == [image.name]


@needs_root
def test_restore_as_an_engine_calls_it(
    fake: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the time of the real runtime's call: the node in the image, the plugin's directory and its variables."""
    fake.add("runc")
    fake.add("criu")
    fake.config.write_text('[runtime]\npath = "runc"\n[amd]\nfw-ver-check = false\n')
    for key, value in fake.env.items():
        monkeypatch.setenv(key, value)
    images = tmp_path / "img"
    image = dumped(images, 41, folder("./dri"), device("./dri/renderD128", 128))
    before = image.read_bytes()
    (images / amd.TOPOLOGY).write_text(json.dumps(kfd.capture(tree(tmp_path / "there", {}))))
    here, compare = tree(tmp_path / "here", {"drm_render_minor": 140, "fw_version": 1}), amd.compare
    monkeypatch.setattr(amd, "compare", lambda images, options: compare(images, options, here))
    monkeypatch.setattr(amd, "check", lambda libdir, criu: "/plugins")
    seen: list[Any] = []

    def run(line: Any, argv: list[str], below: Any, record: Any, verb: str, env: dict[bytes, bytes]) -> Any:
        variables = {key: env[key] for key in env if key.startswith((b"KFD_", b"CRIU_LIBS"))}
        seen.append((sorted(amd_nodes._nodes(str(image))), variables, Path(record.conf).read_text()))
        return 0, False

    monkeypatch.setattr(operation, "run", run)
    words = ["restore", "--detach", "--image-path", str(images), "--work-path", f"{tmp_path}/w"]
    argv = [str(fake.launcher), *words, "--bundle", str(fake.bundle()), "c1"]
    assert restore.main(parse(argv, "runc"), str(fake.launcher)) == 0
    ((nodes, variables, text),) = seen
    assert nodes == [D128, D140] and "libdir /plugins" in text
    assert variables[b"KFD_FW_VER_CHECK"] == b"0"
    assert image.read_bytes() == before
