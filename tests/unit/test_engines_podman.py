# SPDX-License-Identifier: Apache-2.0
"""What podman's database says, where it is, and when podman itself has to be asked."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest

from cryoci.errors import NotFoundError, UnsupportedError
from cryoci.shim.engines import podman
from cryoci.shim.engines.podman import Storage

ID = "ab" * 32
# As podman 5.4 makes them (libpod/sqlite_state_internal.go), as far as they are read.
_TABLES = """
CREATE TABLE DBConfig (ID INTEGER PRIMARY KEY, GraphRoot TEXT NOT NULL, VolumeDir TEXT NOT NULL);
CREATE TABLE ContainerConfig (ID TEXT PRIMARY KEY, JSON TEXT NOT NULL);
CREATE TABLE ContainerState (ID TEXT PRIMARY KEY, JSON TEXT NOT NULL);
"""
_PODMAN = """#!/bin/sh
echo "$*" >>{base}/calls
echo '{{"host": {{"databaseBackend": "{backend}"}}, "store": {{"graphRoot": "{root}", "volumePath": "/asked"}}}}'
"""


class Fake:
    """A podman whose storage is `root`; `calls` are what it was asked."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / "storage"
        self.root.mkdir()
        self.tell(self.root)

    def tell(self, root: Path, backend: str = "sqlite") -> None:
        """What `podman info` says."""
        program = self.base / "bin" / "podman"
        program.parent.mkdir(exist_ok=True)
        program.write_text(_PODMAN.format(base=self.base, root=root, backend=backend))
        program.chmod(0o755)

    def database(self, root: Path, *, graph: str = "") -> None:
        root.mkdir(exist_ok=True)
        with sqlite3.connect(root / "db.sql") as made:
            made.executescript(_TABLES)
            made.execute("INSERT INTO DBConfig VALUES (1, ?, ?)", (graph or str(root), "/volumes"))
            for table in ("ContainerConfig", "ContainerState"):
                made.execute(f"INSERT INTO {table} VALUES (?, ?)", (ID, json.dumps({"in": str(root)})))
        made.close()

    @property
    def calls(self) -> list[str]:
        path = self.base / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ.get('PATH', os.defpath)}")
    return Fake(tmp_path)


def directory(root: Path, container: str = ID) -> str:
    return f"{root}/overlay-containers/{container}/userdata"


def test_the_database_is_where_the_container_is(fake: Fake) -> None:
    fake.database(fake.root)
    config, state = podman._database(ID, directory(fake.root))
    assert config == state == {"in": str(fake.root)}
    assert fake.calls == []


@pytest.mark.parametrize("beside", ["", "/elsewhere", "other"])
def test_else_podman_is_asked_where_it_is(fake: Fake, beside: str, tmp_path: Path) -> None:
    """Nobody knows the container's directory, there is no database near it, or one that does not have it."""
    fake.database(fake.root)
    other = tmp_path / "other"
    fake.database(other)
    with sqlite3.connect(other / "db.sql") as made:
        made.execute("DELETE FROM ContainerState")
    made.close()
    near = {"": "", "/elsewhere": directory(tmp_path / "none"), "other": directory(other)}[beside]
    assert podman._database(ID, near)[0] == {"in": str(fake.root)}
    assert fake.calls == ["info --format=json"]


def test_another_kind_of_database_is_refused(fake: Fake) -> None:
    fake.tell(fake.root, "boltdb")
    with pytest.raises(UnsupportedError, match="boltdb database"):
        podman._database(ID, directory(fake.root))
    fake.tell(fake.root)
    with pytest.raises(UnsupportedError, match="sqlite database"):
        podman._database(ID, directory(fake.root))
    fake.database(fake.root)
    with pytest.raises(NotFoundError, match="is not in podman's database"):
        podman._database("cd" * 32, directory(fake.root, "cd" * 32))
    (fake.root / "db.sql").write_bytes(b"no database" * 1000)
    with pytest.raises(UnsupportedError, match="cannot be read"):
        podman._database(ID, directory(fake.root))


def test_storage_by_a_layer_of_an_image(fake: Fake) -> None:
    fake.database(fake.root)
    assert podman.storage(f"{fake.root}/overlay/{ID}/diff") == Storage(str(fake.root), "/volumes")
    assert fake.calls == []


@pytest.mark.parametrize(
    "case", ["no layer", "vfs", "additional store", "other root", "bolt", "damaged", "no database"]
)
def test_storage_else_as_podman_says(fake: Fake, case: str, tmp_path: Path) -> None:
    layer = f"{fake.root}/overlay/{ID}/diff"
    if case == "other root":
        fake.database(fake.root, graph="/moved")
    elif case != "no database":
        fake.database(fake.root)
    if case == "no layer":
        layer = ""
    elif case == "vfs":
        layer = f"{fake.root}/vfs/dir/{ID}"
    elif case == "additional store":
        layer = f"{tmp_path}/additional/overlay/{ID}/diff"
    elif case == "bolt":
        (fake.root / "libpod").mkdir()
        (fake.root / "libpod/bolt_state.db").touch()
    elif case == "damaged":
        (fake.root / "db.sql").write_bytes(b"no database" * 1000)
    assert podman.storage(layer) == Storage(str(fake.root), "/asked")
    assert fake.calls == ["info --format=json"]
