# SPDX-License-Identifier: Apache-2.0
"""CRIU's CUDA plugin as the engine: its silent ways to do nothing are noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryoci.errors import CheckpointError, NotFoundError, UnsupportedError
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.gpu import plugin
from cryoci.shim.gpu.dump import Dump
from cryoci.shim.gpu.tasks import Task
from tests.fakegpu.build import UUIDS

DUMP = Dump("580.1", 13000, tasks=[Task(2, 3, 1, "python3", {UUIDS[0]: 1 << 20})], engine="plugin")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no cuda_plugin\.so in /") as caught:
        plugin.directory(CriuOptions(libdir=str(tmp_path)))
    assert "[criu] libdir" in (caught.value.hint or "")
    (tmp_path / "cuda_plugin.so").touch()
    assert plugin.directory(CriuOptions(libdir=str(tmp_path))) == str(tmp_path)


def test_a_plugin_of_another_build(tmp_path: Path) -> None:
    (tmp_path / "criu").write_bytes(b"\x7fELF an old one")
    (tmp_path / "cuda_plugin.so").write_bytes(b"\x7fELF\0check_and_remove_inventory_plugin\0")
    with pytest.raises(UnsupportedError, match="newer build"):
        plugin.check_build(str(tmp_path), str(tmp_path / "criu"))
    (tmp_path / "criu").write_bytes(b"\x7fELF\0check_and_remove_inventory_plugin\0")
    plugin.check_build(str(tmp_path), str(tmp_path / "criu"))


@pytest.mark.parametrize(
    ("inventory", "pages", "why"),
    [
        (b"\x08\x02", 1 << 20, "do not name it"),
        (b"\x0acuda_plugin", 4096, "hold 0 MiB"),
        (b"cuda_plugin", 1 << 20, None),
    ],
)
def test_images_tell_whether_it_worked(
    tmp_path: Path, inventory: bytes, pages: int, why: str | None
) -> None:
    (tmp_path / "inventory.img").write_bytes(inventory)
    with (tmp_path / "pages-1.img").open("wb") as f:
        f.truncate(pages)
    if why is None:
        plugin.check_images(str(tmp_path), DUMP)
    else:
        with pytest.raises(CheckpointError, match=f"has not saved the 1 MiB.*{why}"):
            plugin.check_images(str(tmp_path), DUMP)


def test_the_front_is_on_the_path_unless_nvidias_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for _ in range(2):
        path = plugin.variables()[b"PATH"].decode()
        assert path == f"{tmp_path}/run/bin:/usr/bin:/bin"
    front = tmp_path / "run/bin/cuda-checkpoint"
    assert front.resolve().name == "front.py" and front.stat().st_mode & 0o111
    (tmp_path / "own").mkdir()
    own = tmp_path / "own/cuda-checkpoint"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/own")
    assert plugin.variables()[b"PATH"].decode() == f"{tmp_path}/own"
