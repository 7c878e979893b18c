# SPDX-License-Identifier: Apache-2.0
"""Memory that comes to the runtime beside podman: what is offered, what is taken, and what nobody can make of it."""

from __future__ import annotations

import json
import os
import posix
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import RestoreError
from cryoci.shim import handover

LARGE = bytes(handover.LEAST)
NAMES = {"pages-1.img", "cryoci-memory-1-7f00.img"}


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's images: two large files of memory, a small one, and others."""
    monkeypatch.setitem(posix.environ, b"CRYOCI_RUN", os.fsencode(tmp_path / "run"))
    directory = tmp_path / "checkpoint"
    directory.mkdir(mode=0o700)
    for name in (*NAMES, "tmpfs-dev-1.tar.gz.img", "core-1.img"):
        (directory / name).write_bytes(LARGE)
    (directory / "pages-2.img").write_bytes(b"small")
    (directory / "pages-3.img").symlink_to("/etc/passwd")
    (tmp_path / "containers").mkdir()
    return directory


def spec(tmp_path: Path, annotations: dict[str, Any]) -> tuple[str, Path]:
    """A bundle's specification with these annotations, and CRIU's image directory in it."""
    bundle = tmp_path / "containers/id/userdata"
    (bundle / "checkpoint").mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").write_text(json.dumps({"annotations": annotations}))
    return str(bundle / "config.json"), bundle / "checkpoint"


def test_what_is_large_is_linked(images: Path, tmp_path: Path) -> None:
    noted: dict[str, Any] = {handover.ANNOTATION: "stale"}
    with handover.offered(str(images), noted) as names:
        assert names == NAMES
        assert (tmp_path / "run/handover").stat().st_mode & 0o777 == 0o700
        config, target = spec(tmp_path, noted)
        assert handover.take(str(target), config) == (str(target), {})
        assert handover.take(str(target), config) == (str(target), {})  # podman may try twice
    assert {p.name for p in target.iterdir()} == NAMES
    assert all((target / name).samefile(images / name) for name in NAMES)
    assert list((tmp_path / "run/handover").iterdir()) == []
    assert [p.name for p in (tmp_path / "containers").iterdir()] == ["id"]


def test_options_of_criu_come_along(images: Path, tmp_path: Path) -> None:
    noted: dict[str, Any] = {}
    with handover.offered(str(images), noted, {"tcp-close": True, "file-locks": None}):
        config, target = spec(tmp_path, noted)
        assert handover.take(str(target), config) == (str(target), {"tcp-close": True})
    assert handover.take(str(target), config) == (str(target), {})
    images.chmod(0o770)
    with handover.offered(str(images), noted, {"tcp-close": True}) as names:
        config, target = spec(tmp_path, noted)
        assert names == frozenset()
        assert handover.take(str(target), config) == (str(target), {"tcp-close": True})
    with handover.offered(str(images), noted, {"tcp-close": None}):
        assert noted == {}


def test_on_another_file_system_criu_reads_where_they_are(images: Path, tmp_path: Path) -> None:
    noted: dict[str, Any] = {}
    criu = {"tcp-close": True}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other, handover.offered(str(images), noted, criu):
        config, target = spec(Path(other), noted)
        assert target.stat().st_dev != images.stat().st_dev
        assert handover.take(str(target), config) == (str(images), criu)
        assert list(target.iterdir()) == []


def test_nothing_is_offered_that_others_can_change(images: Path, tmp_path: Path) -> None:
    noted: dict[str, Any] = {handover.ANNOTATION: "stale"}
    images.chmod(0o770)
    with handover.offered(str(images), noted) as names:
        assert names == frozenset() and noted == {}
    with handover.offered(str(tmp_path / "containers"), noted) as names:
        assert names == frozenset()


@pytest.mark.parametrize("token", ["../../images", "0" * 32, "", 5, None, ["x"]])
def test_a_token_that_was_not_given_gets_nothing(images: Path, tmp_path: Path, token: object) -> None:
    config, target = spec(tmp_path, {handover.ANNOTATION: token})
    handover.take(str(target), config)  # nobody has offered anything
    with handover.offered(str(images), {}) as names:
        assert names == NAMES
        handover.take(str(target), config)
        Path(config).write_text("[")
        handover.take(str(target), config)
    assert list(target.iterdir()) == []


def test_what_is_gone_is_said(images: Path, tmp_path: Path) -> None:
    noted: dict[str, Any] = {}
    with handover.offered(str(images), noted):
        config, target = spec(tmp_path, noted)
        (images / "pages-1.img").unlink()
        with pytest.raises(RestoreError, match=r"pages-1\.img of the checkpoint could not be brought"):
            handover.take(str(target), config)
