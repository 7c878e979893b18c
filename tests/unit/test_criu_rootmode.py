# SPDX-License-Identifier: Apache-2.0
"""The mode of the root directory decides whether CRIU compares modes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cryoci.shim.criu.rootmode import dumped, lines
from tests.unit.criu_images import image, message, write

FILES = image(
    "files",
    message(f1=1, f2=8, f3=message(f1=8, f2=0, f3=0, f6="/usr", f10=0o40700)),
    message(f1=1, f2=9, f3=message(f1=9, f2=0, f3=0, f6="/", f10=0o40755)),
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    made = {
        "fs_12": image("fs", message(f1=9, f2=8)),
        "fs_1": image("fs", message(f1=8, f2=9)),
        "files": FILES,
    }
    return write(tmp_path, **made) / "checkpoint"


def spec(tmp_path: Path, mode: int, path: str = "rootfs") -> str:
    """config.json of a bundle whose root directory has `mode`."""
    root = tmp_path / "bundle" / "rootfs"
    root.mkdir(parents=True)
    root.chmod(mode)
    config = root.with_name("config.json")
    config.write_text(json.dumps({"root": {"path": str(root) if path == "absolute" else path}}))
    return str(config)


@pytest.mark.parametrize("path", ["rootfs", "absolute"])
@pytest.mark.parametrize(("mode", "said"), [(0o755, ""), (0o555, "skip-file-rwx-check\n")])
def test_where_they_differ(tmp_path: Path, images: Path, mode: int, said: str, path: str) -> None:
    assert dumped(str(images)) == 0o40755  # of the first process, not of the one with the lowest name
    assert lines(str(images), spec(tmp_path, mode, path)) == said


@pytest.mark.parametrize("files", [b"", FILES[:30], b"\xff" * 64, FILES[:8]])
def test_damaged_images_say_nothing(tmp_path: Path, images: Path, files: bytes) -> None:
    (images / "files.img").write_bytes(files)
    assert lines(str(images), spec(tmp_path, 0o555)) == ""


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"root": 1}', "[" * 100_000])
def test_a_bundle_that_is_none_says_nothing(tmp_path: Path, images: Path, text: str) -> None:
    path = spec(tmp_path, 0o555)
    Path(path).write_text(text)
    assert lines(str(images), path) == ""


def test_no_images_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for images in (tmp_path / "none", tmp_path / "absent"):
        assert lines(str(images), spec(tmp_path / images.name, 0o555)) == ""
