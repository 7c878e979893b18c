# SPDX-License-Identifier: Apache-2.0
"""containerd's rootfs-diff.tar, a layer with whiteouts: applied as it is, and as the pair of podman's that it becomes.

What is expected is written out by image-spec layer.md: a whiteout hides what lies in the layers below, never what its
own layer has, wherever in the layer it stands.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from cryoci.errors import RestoreError
from cryoci.ociimage import rootfsdiff
from cryoci.shim import rootfs
from cryoci.shim.annotated import fetch, files
from tests.unit.trees import entry

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="chroot and owners need root")

DIR = tarfile.DIRTYPE
BASE = ("etc/passwd", "var/a", "var/sub/b", "var/sub/deep/c", "opt/x/y", "opt/z", "bin/tool")


def make(directory: Path) -> Path:
    for name in BASE:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("base")
    (directory / "link").symlink_to("var")
    return directory


def packed(*members: tarfile.TarInfo | str) -> bytes:
    """A tar of these; a plain name is a file with `new` in it."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w", format=tarfile.PAX_FORMAT) as out:
        for one in members:
            if isinstance(one, str):
                whiteout = os.path.basename(one).startswith(".wh.")
                info, data = entry(one), b"" if whiteout else b"new"
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
            else:
                out.addfile(one)
    return result.getvalue()


def files_in(top: Path) -> dict[str, str]:
    """Every file and what is in it; directories that are empty; links."""
    found = {}
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            if not any(path.iterdir()):
                found[f"{name}/"] = ""
        else:
            found[name] = path.read_text()
    return found


def without(*names: str, **made: str) -> dict[str, str]:
    """The base less `names` and what is below them, and with what was made (`__` stands for /)."""
    kept = {
        name: "base"
        for name in BASE
        if not any(name == gone or name.startswith(gone + "/") for gone in names)
    }
    return {**kept, "link": "-> var", **{name.replace("__", "/"): text for name, text in made.items()}}


CASES: dict[str, tuple[list[tarfile.TarInfo | str], dict[str, str]]] = {
    "opaque-first": (
        [entry("var", DIR), "var/.wh..wh..opq", "var/new"],
        without("var", var__new="new"),
    ),
    "opaque-last": (
        [entry("var", DIR), "var/new", "var/sub/new", "var/.wh..wh..opq"],
        without("var", var__new="new", var__sub__new="new"),
    ),
    "opaque-and-the-same-names": (
        ["var/.wh..wh..opq", "var/a", entry("var/sub", DIR), "var/sub/new"],
        without("var", var__a="new", var__sub__new="new"),
    ),
    "opaque-and-empty": ([entry("opt", DIR), "opt/.wh..wh..opq"], {**without("opt"), "opt/": ""}),
    "opaque-inside": (["var/sub/.wh..wh..opq", "var/sub/new"], without("var/sub", var__sub__new="new")),
    "opaque-in-opaque": (
        ["var/.wh..wh..opq", "var/sub/.wh..wh..opq", "var/sub/new"],
        without("var", var__sub__new="new"),
    ),
    "opaque-where-nothing-is": (
        [entry("srv", DIR), "srv/.wh..wh..opq", "srv/new"],
        without(srv__new="new"),
    ),
    "opaque-with-dots": (["./opt/.wh..wh..opq", "./opt/new"], without("opt", opt__new="new")),
    "whiteout": (["var/.wh.a", "opt/.wh.x"], without("var/a", "opt/x")),
    "whiteout-of-nothing": (["var/.wh.none", "none/.wh.none"], without()),
    "whiteout-of-what-is-made-anew": (
        [".wh.etc", entry("etc", DIR), "etc/new"],
        without("etc", etc__new="new"),
    ),
    "whiteout-after-what-is-made-anew": (
        [entry("etc", DIR), "etc/new", ".wh.etc"],
        without("etc", etc__new="new"),
    ),
    "whiteout-of-a-file-that-is-made-anew": (["var/a", "var/.wh.a"], without(var__a="new")),
    "whiteout-of-a-directory-that-becomes-a-file": (
        ["var/.wh.sub", "var/sub"],
        without("var/sub", var__sub="new"),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("converted", [False, True], ids=["as-it-is", "converted"])
def test_whiteouts(tmp_path: Path, name: str, converted: bool) -> None:
    members, expected = CASES[name]
    root = make(tmp_path / "root")
    layer = tmp_path / "rootfs-diff.tar"
    layer.write_bytes(gzip.compress(packed(*members)))
    if converted:
        plain, deleted = tmp_path / "plain.tar", tmp_path / "deleted.files"
        gone, hides_all = rootfsdiff.from_layer(layer, plain)
        assert not hides_all
        rootfsdiff.write_deleted(deleted, gone)
        rootfs.apply(root, plain if plain.exists() else None, deleted)
    else:
        rootfs.apply(root, layer)
    found = files_in(root)
    if name == "whiteout-of-nothing":
        found.pop("none/", None)
    assert found == {k: v for k, v in expected.items() if k != "opt/" or name == "opaque-and-empty"}


def test_modes_of_directories_that_are_cleared(tmp_path: Path) -> None:
    """That of the layer's own entry, which comes after; 0755 where it has none."""
    root = make(tmp_path / "root")
    layer = tmp_path / "layer"
    members: list[tarfile.TarInfo | str] = [
        entry("var", DIR, mode=0o1777),
        "var/.wh..wh..opq",
        "opt/x/.wh..wh..opq",
        "opt/x/new",
    ]
    layer.write_bytes(gzip.compress(packed(*members)))
    rootfsdiff.from_layer(layer, tmp_path / "plain.tar")
    rootfs.apply(root, tmp_path / "plain.tar")
    assert (root / "var").stat().st_mode & 0o7777 == 0o1777 and not any((root / "var").iterdir())
    assert (root / "opt/x").stat().st_mode & 0o7777 == 0o755
    assert files_in(root / "opt") == {"x/new": "new", "z": "base"}


def test_a_root_that_is_cleared(tmp_path: Path) -> None:
    """As it is it can be said; podman's pair has no form for it."""
    root = make(tmp_path / "root")
    layer = tmp_path / "layer"
    layer.write_bytes(gzip.compress(packed(".wh..wh..opq", "etc/new")))
    assert rootfsdiff.from_layer(layer, tmp_path / "plain.tar") == ([], True)
    rootfs.apply(root, layer)
    assert files_in(root) == {"etc/new": "new"}


def test_podmans_own_tar_has_no_whiteouts(tmp_path: Path) -> None:
    """A file that is named like one is a file there."""
    root = make(tmp_path / "root")
    (tmp_path / "plain.tar").write_bytes(packed("var/.wh.a"))
    rootfs.apply(root, tmp_path / "plain.tar")
    assert (root / "var/.wh.a").exists() and (root / "var/a").exists()


@pytest.mark.parametrize(
    "name",
    [".wh..", ".wh...", ".wh.", "../../../{outside}/.wh..wh..opq", "out/.wh..wh..opq", "out/.wh.precious"],
)
def test_whiteouts_that_want_out(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    root = make(tmp_path / "root")
    (root / "out").symlink_to(outside)
    layer = tmp_path / "layer"
    layer.write_bytes(gzip.compress(packed(name.replace("{outside}", str(outside).lstrip("/")))))
    rootfs.apply(root, layer)
    assert (outside / "precious").read_text() == "precious"
    assert files_in(root) == {**without(), "out": f"-> {outside}"}


def test_a_layer_that_is_cut_off(tmp_path: Path) -> None:
    root = make(tmp_path / "root")
    whole = gzip.compress(packed("var/new", *(f"var/{i}" for i in range(50))))
    for size in (2, 20, len(whole) // 2):
        (tmp_path / "layer").write_bytes(whole[:size])
        with pytest.raises(RestoreError):
            rootfs.apply(root, tmp_path / "layer")


def test_containerds_checkpoint_in_an_annotated_create(tmp_path: Path) -> None:
    root = make(tmp_path / "root")
    (tmp_path / "rootfs-diff.tar").write_bytes(gzip.compress(packed("var/.wh..wh..opq", "var/new")))
    (tmp_path / "config.dump").write_text(json.dumps({}))
    files.apply(fetch.Checkpoint(tmp_path, "", {}), root, {})
    assert files_in(root) == without("var", var__new="new")
