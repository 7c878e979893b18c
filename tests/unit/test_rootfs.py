# SPDX-License-Identifier: Apache-2.0
"""The file system of a container to tar and back: real files, real overlay mounts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cryoci.errors import RestoreError, SpaceError, ToolError
from cryoci.shim import rootfs
from cryoci.shim.engines.container import Overlay
from tests.unit.trees import furnish, mounted, picture, without_devices

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="chroot, owners and overlay mounts need root")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made = tmp_path / "rootfs"
    made.mkdir(mode=0o755)
    return made


def test_round_trip_of_everything(tmp_path: Path, base: Path) -> None:
    source = tmp_path / "source"
    source.mkdir(mode=0o711)
    furnish(source)
    size = rootfs.save_all(source, [], tmp_path / "all.tar")
    assert size == (tmp_path / "all.tar").stat().st_size < 4 << 20, "the holes of the sparse file stay holes"
    rootfs.apply(base, tmp_path / "all.tar")
    assert picture(base) == without_devices(picture(source))
    assert (base / "sparse").stat().st_blocks * 512 < 1 << 20
    assert not (base / "device").exists()


def test_round_trip_over_other_files(tmp_path: Path, base: Path) -> None:
    """What stands in the way is replaced, whatever it is."""
    source = tmp_path / "source"
    source.mkdir()
    furnish(source)
    rootfs.save_all(source, [], tmp_path / "all.tar")
    (base / "outside").mkdir()
    (base / "outside/kept").write_text("kept")
    (base / "etc").symlink_to("outside")
    (base / "shared").write_text("a file where a directory comes")
    (base / "sparse").mkdir()
    (base / "sparse/full").write_text("a directory where a file comes")
    (base / "bin").mkdir()
    os.link(base / "outside/kept", base / "bin/su")
    rootfs.apply(base, tmp_path / "all.tar")
    assert (base / "outside/kept").read_text() == "kept"
    expected = without_devices(picture(source))
    seen = picture(base)
    assert {name: seen[name] for name in expected if name != b"."} == {
        name: what for name, what in expected.items() if name != b"."
    }


def test_save_all_leaves_out_other_mounts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("proc/1", "data/x", "database", "run/secrets/s"):
        (source / name).mkdir(parents=True)
    rootfs.save_all(source, ["/proc", "/data/", "/run//secrets", "/"], tmp_path / "all.tar")
    with tarfile.open(tmp_path / "all.tar") as tar:
        assert sorted(tar.getnames()) == [".", "database", "run"]


def test_save_tree(tmp_path: Path, base: Path) -> None:
    source = tmp_path / "shm"
    source.mkdir(mode=0o1777)
    (source / "sem.x").write_bytes(b"\0" * 32)
    subprocess.run(
        ["python3", "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({str(source / 'sock')!r})"],
        check=True,
    )
    rootfs.save_tree(source, tmp_path / "shm.tar")
    rootfs.apply(base, tmp_path / "shm.tar")
    assert picture(base) == picture(source)
    assert not (base / "sock").exists()


def test_full_disk(tmp_path: Path) -> None:
    source, small = tmp_path / "source", tmp_path / "small"
    source.mkdir()
    small.mkdir()
    (source / "big").write_bytes(os.urandom(2 << 20))
    with mounted("tmpfs", small, "size=512k"):
        with pytest.raises(SpaceError):
            rootfs.save_all(source, [], small / "all.tar")
    rootfs.save_all(source, [], tmp_path / "all.tar")
    target = tmp_path / "target"
    target.mkdir()
    with mounted("tmpfs", target, "size=512k"):
        with pytest.raises(RestoreError, match="No space left"):
            rootfs.apply(target, tmp_path / "all.tar")


def test_a_file_that_vanishes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="No such file"):
        rootfs.save_tree(tmp_path / "nowhere", tmp_path / "x.tar")


# -- overlay


class Layers:
    """Two lower layers and a rw layer on a tmpfs, mounted as overlay with `options`."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.merged, self.upper = top / "merged", top / "upper"
        self.lowers = (top / "lower1", top / "lower0")
        for path in (self.merged, self.upper, top / "work", *self.lowers):
            path.mkdir()

    @property
    def overlay(self) -> Overlay:
        return Overlay(self.upper, self.lowers)

    def mount(self, options: str = "") -> mounted:
        lower = ":".join(map(str, self.lowers))
        words = f"lowerdir={lower},upperdir={self.upper},workdir={self.top}/work{options}"
        return mounted("overlay", self.merged, words)

    def travel(self, mounts: list[str] | None = None) -> list[str]:
        """Save the changes; apply them to a copy of the lower layers in `there`; return the deleted names."""
        diff, deleted = self.top / "diff.tar", self.top / "deleted"
        rootfs.save_diff(self.merged, self.overlay, mounts or [], diff, deleted)
        there = self.top / "there"
        there.mkdir()
        with mounted("overlay", there, f"lowerdir={self.lowers[0]}:{self.lowers[1]}"):
            copy = self.top / "copy"
            shutil.copytree(there, copy, symlinks=True)
        rootfs.apply(copy, diff if diff.exists() else None, deleted if deleted.exists() else None)
        return list(json.loads(deleted.read_text())) if deleted.exists() else []


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    place = tmp_path / "tmpfs"
    place.mkdir()
    with mounted("tmpfs", place, "size=64m"):
        made = Layers(place)
        low, high = made.lowers[1], made.lowers[0]
        for name in ("etc/a", "etc/b", "etc/sub/c", "opt/app/bin/run", "opt/app/lib/so", "data/one", "file"):
            (low / name).parent.mkdir(parents=True, exist_ok=True)
            (low / name).write_text(f"low {name}")
        (high / "opt/app").mkdir(parents=True)
        (high / "opt/app/extra").write_text("high extra")
        yield made


def names_and_texts(top: Path) -> dict[str, str | None]:
    return {
        str(path.relative_to(top)): path.read_text() if path.is_file() and not path.is_symlink() else None
        for path in top.rglob("*")
    }


def change_little(m: Path) -> None:
    (m / "etc/a").write_text("changed")
    (m / "etc/b").unlink()
    (m / "new").mkdir()
    (m / "new/file").write_text("new")


def replace_directory(m: Path) -> None:
    """An opaque directory with a nested one, which hides lower files of both layers."""
    shutil.rmtree(m / "opt/app")
    (m / "opt/app/lib").mkdir(parents=True)
    (m / "opt/app/lib/other").write_text("other")


def remove_whole_directory(m: Path) -> None:
    shutil.rmtree(m / "etc")


def directory_becomes_file(m: Path) -> None:
    shutil.rmtree(m / "data")
    (m / "data").write_text("a file now")


def file_becomes_directory(m: Path) -> None:
    (m / "file").unlink()
    (m / "file").mkdir()
    (m / "file/inner").write_text("inner")


def directory_becomes_link(m: Path) -> None:
    shutil.rmtree(m / "data")
    (m / "data").symlink_to("/etc")


def rename_directory(m: Path) -> None:
    os.rename(m / "opt/app", m / "opt/moved")
    (m / "opt/moved/bin/run").write_text("changed after the move")
    (m / "opt/moved/lib/so").unlink()


def rename_over_place_of_lower(m: Path) -> None:
    """The new name of a renamed directory is one that a lower layer has too."""
    shutil.rmtree(m / "etc")
    os.rename(m / "opt", m / "etc")


def change_mode_only(m: Path) -> None:
    (m / "opt/app/bin/run").chmod(0o755)
    os.chown(m / "etc/a", 12, 13)


def change_nothing(m: Path) -> None:
    pass


CHANGES: list[Callable[[Path], None]] = [
    change_little,
    replace_directory,
    remove_whole_directory,
    directory_becomes_file,
    file_becomes_directory,
    directory_becomes_link,
    rename_directory,
    rename_over_place_of_lower,
    change_mode_only,
    change_nothing,
]


@pytest.mark.parametrize(
    "options",
    ["", ",redirect_dir=on", ",redirect_dir=on,metacopy=on"],
    ids=["plain", "redirect_dir", "metacopy"],
)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_overlay_round_trip(layers: Layers, change: Callable[[Path], None], options: str) -> None:
    with layers.mount(options):
        try:
            change(layers.merged)
        except OSError as e:
            if e.errno != 18:  # EXDEV: without redirect_dir, overlay has mv copy the directory
                raise
            pytest.skip("overlay without redirect_dir renames no lower directory; mv copies it")
        layers.travel()
        assert names_and_texts(layers.top / "copy") == names_and_texts(layers.merged)
        for name in ("opt/app/bin/run", "etc/a"):
            if (layers.merged / name).exists():
                there, here = (layers.top / "copy" / name).stat(), (layers.merged / name).stat()
                if change is change_mode_only:
                    assert (there.st_mode, there.st_uid) == (here.st_mode, here.st_uid)


def test_deleted_names_are_as_podman_writes_them(layers: Layers) -> None:
    with layers.mount():
        (layers.merged / "etc/b").unlink()
        replace_directory(layers.merged)
        assert layers.travel() == ["/etc/b", "/opt/app/bin", "/opt/app/extra", "/opt/app/lib/so"]


def test_what_other_mounts_hide_stays(layers: Layers) -> None:
    with layers.mount():
        (layers.merged / "data/two").write_text("two")
        (layers.merged / "etc/resolv.conf").write_text("")
        assert layers.travel(["/data", "/etc/resolv.conf"]) == []
        assert not (layers.top / "copy/data/two").exists()


def test_no_change_no_files(layers: Layers) -> None:
    with layers.mount():
        assert layers.travel() == []
    assert not (layers.top / "diff.tar").exists()
    assert not (layers.top / "deleted").exists()


def test_links_of_a_lower_layer_lead_nowhere(layers: Layers, tmp_path: Path) -> None:
    """An opaque directory over a lower link to /: this host's names are not taken for the container's."""
    (layers.lowers[1] / "root").symlink_to("/")
    with layers.mount():
        (layers.merged / "root").unlink()
        (layers.merged / "root/etc").mkdir(parents=True)
        os.setxattr(layers.upper / "root/etc", "trusted.overlay.opaque", b"y")
        os.setxattr(layers.upper / "root", "trusted.overlay.opaque", b"y")
        assert layers.travel() == []
