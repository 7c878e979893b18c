# SPDX-License-Identifier: Apache-2.0
"""Atomic files: the old one or the new one, nothing else."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

from cryoci import files


@pytest.mark.parametrize("data", [b"bytes\xff", "text \u00fc", b""])
def test_write(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    files.write_atomic(path, data, mode=0o640)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["file"]


def test_relative_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files.write_atomic("file", "x")
    assert (tmp_path / "file").read_text() == "x"


def test_umask_does_not_matter(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        files.write_atomic(tmp_path / "file", "x", mode=0o644)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["fsync", "rename", "fchmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("target")
    (tmp_path / "file").symlink_to("target")
    files.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "target").read_text() == "target"
    assert not (tmp_path / "file").is_symlink()
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to("target")
    with pytest.raises(OSError):
        files.write_atomic(tmp_path / "file", "newer")
    assert (tmp_path / "target").read_text() == "target"


def test_json(tmp_path: Path) -> None:
    value = {"a": [1, None, "\u00fc"], "b": {}}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text().endswith("}\n")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "y.json")


def test_sync_tree_touches_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("top/a", "top/sub/b", "top/sub/deep/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    seen: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files.sync_tree(tmp_path / "top")
    assert set(seen) == {".", "top", "top/a", "top/sub", "top/sub/b", "top/sub/deep", "top/sub/deep/c"}


def test_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "made" / "here"))
    with pytest.raises(ZeroDivisionError):
        with files.scratch("work.") as place:
            assert place.parent == tmp_path / "made/here"
            assert place.name.startswith("work.")
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
            (place / "file").write_text("x")
            raise ZeroDivisionError
    assert list((tmp_path / "made/here").iterdir()) == []


def test_where_scratch_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's is not in /tmp, which may be memory; others have no place of cryoci's."""
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(files, "_SCRATCH", tmp_path / "own")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    for user, where in ((0, "own"), (1000, "system")):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        with files.scratch("work.") as place:
            assert place.parent == tmp_path / where
