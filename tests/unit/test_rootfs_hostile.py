# SPDX-License-Identifier: Apache-2.0
"""Archives and deleted.files that want out of the container's rootfs, or are damaged."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryoci.errors import ImageError, RestoreError
from cryoci.shim import rootfs
from tests.unit.trees import entry, picture, tar_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="chroot, owners and overlay mounts need root")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made = tmp_path / "rootfs"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside the rootfs that nothing may touch."""
    made = tmp_path / "outside"
    made.mkdir()
    (made / "precious").write_text("precious")
    return made


HOSTILE: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "absolute name": [(entry("{outside}/evil"), b"evil")],
    "parents": [(entry("../../../../../{outside}/evil"), b"evil")],
    "link then through": [
        (entry("link", tarfile.SYMTYPE, "{outside}"), b""),
        (entry("link/evil"), b"evil"),
    ],
    "directory becomes a link": [
        (entry("d", tarfile.DIRTYPE), b""),
        (entry("d", tarfile.SYMTYPE, "{outside}"), b""),
        (entry("d/evil"), b"evil"),
    ],
    "relative link out": [
        (entry("link", tarfile.SYMTYPE, "../../../../../../../../{outside}"), b""),
        (entry("link/precious"), b"evil"),
    ],
    "link in the base": [(entry("etc/precious"), b"evil")],
    "replace through a link": [(entry("etc/precious", tarfile.SYMTYPE, "/x"), b"")],
    "mode through a link": [(entry("etc/precious", mode=0o777, uid=12), b"evil")],
    "directory through a link": [(entry("etc/made", tarfile.DIRTYPE), b"")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_leaves_the_rootfs(tmp_path: Path, base: Path, outside: Path, name: str) -> None:
    before = picture(outside)
    (base / "etc").symlink_to(outside)
    members = []
    for member, data in HOSTILE[name]:
        copy = entry(
            member.name.replace("{outside}", str(outside).lstrip("/"))
            if not member.name.startswith("{")
            else str(outside) + "/evil",
            member.type,
            member.linkname.replace("{outside}", str(outside)),
            mode=member.mode,
            uid=member.uid,
        )
        members.append((copy, data))
    try:
        rootfs.apply(base, tar_of(tmp_path / "t.tar", *members))
    except RestoreError:
        pass  # a link that leads nowhere inside: an error is as good as a file inside
    assert picture(outside) == before


@pytest.mark.parametrize("target", ["{outside}/precious", "../../../{outside}/precious"])
def test_hard_link_to_the_outside(tmp_path: Path, base: Path, outside: Path, target: str) -> None:
    before = (outside / "precious").stat()
    link = entry("stolen", tarfile.LNKTYPE, target.replace("{outside}", str(outside)))
    with pytest.raises(RestoreError):
        rootfs.apply(base, tar_of(tmp_path / "t.tar", (link, b"")))
    assert (outside / "precious").stat().st_nlink == before.st_nlink
    assert not (base / "stolen").exists()


def test_devices_are_not_made(tmp_path: Path, base: Path) -> None:
    members = [
        (entry("sda", tarfile.BLKTYPE, devmajor=8, devminor=0), b""),
        (entry("mem", tarfile.CHRTYPE, devmajor=1, devminor=1), b""),
        (entry("pipe", tarfile.FIFOTYPE), b""),
        (entry("same", tarfile.LNKTYPE, "mem"), b""),
        (entry("again", tarfile.LNKTYPE, "/same"), b""),
    ]
    rootfs.apply(base, tar_of(tmp_path / "t.tar", *members))
    assert [path.name for path in base.iterdir()] == ["pipe"]


def test_attributes_of_the_host_are_not_set(tmp_path: Path, base: Path) -> None:
    member = entry("f")
    member.pax_headers = {
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.security.selinux": "system_u:object_r:shadow_t:s0",
        "SCHILY.xattr.security.ima": "x",
        "SCHILY.xattr.user.fine": "fine",
    }
    rootfs.apply(base, tar_of(tmp_path / "t.tar", (member, b"x")))
    assert os.listxattr(base / "f") == ["user.fine"]


@pytest.mark.parametrize("name", [".", "/", "..", "a/../.."])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_the_root_is_not_replaced(tmp_path: Path, base: Path, name: str, kind: bytes) -> None:
    (base / "kept").write_text("kept")
    with pytest.raises(RestoreError):
        rootfs.apply(base, tar_of(tmp_path / "t.tar", (entry(name, kind, "x"), b"")))
    assert (base / "kept").read_text() == "kept"


def test_cut_off_at_every_block(tmp_path: Path, base: Path) -> None:
    whole = tar_of(tmp_path / "t.tar", (entry("a"), b"a" * 700), (entry("b"), b"b")).read_bytes()
    cut = tmp_path / "cut.tar"
    last = 5 * tarfile.BLOCKSIZE  # header, two blocks, header, block
    for size in range(0, last + 1, 256):
        cut.write_bytes(whole[:size])
        if size == 0:
            continue  # an empty file is podman's way to say that nothing changed
        with pytest.raises(RestoreError):
            rootfs.apply(base, cut)
    cut.write_bytes(whole[: last + tarfile.BLOCKSIZE])
    rootfs.apply(base, cut)
    assert (base / "b").read_text() == "b"


def test_damaged_header_in_the_middle(tmp_path: Path, base: Path) -> None:
    raw = bytearray(tar_of(tmp_path / "t.tar", (entry("a"), b"a"), (entry("b"), b"b")).read_bytes())
    raw[2 * 512 + 150] ^= 0xFF
    (tmp_path / "t.tar").write_bytes(raw)
    with pytest.raises(RestoreError, match="damaged or cut off at byte 1024"):
        rootfs.apply(base, tmp_path / "t.tar")


def test_no_tar_at_all(tmp_path: Path, base: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(RestoreError):
        rootfs.apply(base, tmp_path / "t.tar")


# -- deleted.files


def deleted(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "deleted.files"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    "value",
    ["", "{", "[" * 100000, {"a": 1}, [1], [["/x"]], ["a\0b"], "null", '["\\ud800"]'],
    ids=range(9),
)
def test_deleted_files_that_is_none(tmp_path: Path, base: Path, value: object) -> None:
    with pytest.raises(ImageError):
        rootfs.apply(base, None, deleted(tmp_path, value))


def test_deleted_files_that_is_too_large(tmp_path: Path, base: Path) -> None:
    with deleted(tmp_path, []).open("ab") as f:
        f.truncate(1 << 30)
    with pytest.raises(ImageError, match="larger than"):
        rootfs.apply(base, None, tmp_path / "deleted.files")


def test_deleted_names_stay_inside(tmp_path: Path, base: Path, outside: Path) -> None:
    (base / "etc").symlink_to(outside)
    (base / "dir/sub").mkdir(parents=True)
    (base / "dir/sub/f").write_text("f")
    (base / "dir/link").symlink_to(outside)
    (base / "kept").write_text("kept")
    (base / "raw\udcff").write_text("raw")
    names = [
        "/etc/precious", f"../../..{outside}/precious", f"{outside}/precious", "/", "", ".", "..", "//", "a\nb",
        "/dir", "/not/there", "/kept/below-a-file", "raw\udcff",
    ]  # fmt: skip
    rootfs.apply(base, None, deleted(tmp_path, names))
    assert (outside / "precious").read_text() == "precious"
    assert sorted(path.name for path in base.iterdir()) == ["etc", "kept"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.text(max_size=12),
            st.from_regex(r"(\.\.?/|/|outside|precious|link|\\){1,6}", fullmatch=True),
        ),
        max_size=5,
    )
)
def test_no_list_of_names_reaches_out(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    top = tmp_path_factory.mktemp("deleted")
    (top / "outside").mkdir()
    (top / "outside/precious").write_text("precious")
    (top / "root").mkdir()
    (top / "root/link").symlink_to("../outside")
    try:
        rootfs.apply(top / "root", None, deleted(top, names))
    except ImageError:
        pass
    assert (top / "outside/precious").read_text() == "precious"
    assert (top / "root").is_dir()


def test_tar_first_then_deleted(tmp_path: Path, base: Path) -> None:
    tar = tar_of(tmp_path / "t.tar", (entry("both"), b"x"), (entry("only"), b"x"))
    rootfs.apply(base, tar, deleted(tmp_path, ["/both"]))
    assert [path.name for path in base.iterdir()] == ["only"]


def test_the_archive_itself_may_not_be_a_link(tmp_path: Path, base: Path) -> None:
    tar_of(tmp_path / "real.tar", (entry("f"), b"x"))
    (tmp_path / "link.tar").symlink_to("real.tar")
    with pytest.raises(OSError):
        rootfs.apply(base, tmp_path / "link.tar")
