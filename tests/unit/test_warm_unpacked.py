# SPDX-License-Identifier: Apache-2.0
"""`cryoci warm --to unpacked`: a restore takes what lies there as it is, and nothing that is not as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    TrustError,
    UnsupportedError,
    UsageError,
)
from cryoci.ociimage import reference
from cryoci.ociimage.seal import age
from cryoci.ociimage.trust import policy
from cryoci.shim.engines import restore as engine
from cryoci.shim.engines.options import Restored
from cryoci.uses import incremental, warm_unpacked
from tests.unit.commands import cryoci, says
from tests.unit.images import checkpoint, no_credentials, tree_of

__all__ = ["checkpoint", "no_credentials"]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="what is unpacked is root's"),
    pytest.mark.usefixtures("no_credentials"),
]


class Engine:
    """Takes what it is to restore, and looks at it while it is there."""

    def __init__(self) -> None:
        self.places: list[Path] = []
        self.trees: list[dict[str, bytes]] = []
        self.look: Callable[[], object] = lambda: None

    def __call__(self, directory: Path, options: Any) -> Restored:
        self.places.append(directory)
        self.trees.append(tree_of(directory))
        self.look()
        return Restored("podman", "ab" * 32, "web")


@pytest.fixture(autouse=True)
def sink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    """In the place of the engines."""
    made = Engine()
    monkeypatch.setattr(engine, "restore", made)
    monkeypatch.setattr(incremental, "restored", lambda *words: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    return made


@pytest.fixture
def warm(checkpoint: Path) -> Path:
    """Where web:1 of the local store lies unpacked."""
    says("push", str(checkpoint), "web:1")
    one = json.loads(says("warm", "--json", "--to", "unpacked", "web:1"))[0]
    assert one["place"] == "unpacked" and one["unpacked"] == sum(map(len, tree_of(checkpoint).values()))
    (found,) = warm_unpacked._places()
    assert found.name == one["digest"].removeprefix("sha256:")
    return found


def lose_the_image(store: Path) -> None:
    """The disk loses the largest blob of the local store."""
    max((store / "blobs/sha256").iterdir(), key=lambda file: file.stat().st_size).write_bytes(b"lost")


def test_a_restore_unpacks_nothing(warm: Path, checkpoint: Path, sink: Engine, tmp_path: Path) -> None:
    lose_the_image(tmp_path / "store")
    assert "were unpacked here" in says("restore", "web:1", "--detach")
    assert sink.places == [warm / "files"] and sink.trees == [tree_of(checkpoint)]
    assert warm.is_dir() and not list((tmp_path / "scratch").iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in (warm, *warm.rglob("*")))
    listed = json.loads(says("warm", "--list", "--json"))["unpacked"]
    assert [one["reference"] for one in listed] == ["web:1"] and "unpacked" in says("warm", "--list")
    # by the name of the registry that it might have come from
    assert says("warm", "--drop", "registry.example:5000/web:1") == "web:1\n" and not warm.exists()
    assert isinstance(cryoci("restore", "web:1", "--detach").exception, IntegrityError)


def flip(files: Path) -> None:
    path = files / "checkpoint/pages-1.img"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def to_a_link(files: Path) -> None:
    path = files / "checkpoint/pages-1.img"
    path.rename(files.parent.parent / "elsewhere")
    path.symlink_to(files.parent.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "an end": lambda files: os.truncate(files / "checkpoint/pages-1.img", 5),
    "a file": lambda files: (files / "checkpoint/pages-1.img").unlink(),
    "one more": lambda files: (files / "checkpoint/pages-9.img").touch(mode=0o600),
    "of others": lambda files: os.chown(files / "checkpoint/pages-1.img", 1, 1),
    "for others": lambda files: (files / "checkpoint").chmod(0o755),
    "a link": to_a_link,
    "its note": lambda files: (files.parent / "image.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_as_it_was_is_not_restored(
    warm: Path, checkpoint: Path, sink: Engine, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(warm / "files")
    done = cryoci("restore", "web:1", "--detach")
    assert done.exit_code == 0 and "is not as it was" in done.output
    assert sink.trees == [tree_of(checkpoint)] and warm not in sink.places[0].parents
    lose_the_image(tmp_path / "store")
    assert (
        isinstance(cryoci("restore", "web:1", "--detach").exception, IntegrityError) and len(sink.trees) == 1
    )


def test_it_is_made_again_when_it_is_damaged(warm: Path, sink: Engine) -> None:
    flip(warm / "files")
    says("warm", "--to", "unpacked", "web:1")
    says("restore", "web:1", "--detach")
    assert sink.places == [warm / "files"]


def test_the_policy_is_asked_each_time(
    warm: Path, sink: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = tmp_path / "policy.toml"
    strict.write_text('mode = "strict"\n')
    monkeypatch.setattr(policy, "PATH", strict)
    assert isinstance(cryoci("restore", "web:1", "--detach").exception, TrustError) and sink.trees == []


def test_it_belongs_to_one_image(warm: Path, checkpoint: Path, sink: Engine) -> None:
    (checkpoint / "checkpoint/pages-1.img").write_bytes(b"other" * 1000)
    says("push", str(checkpoint), "web:1")
    says("restore", "web:1", "--detach")
    assert sink.trees == [tree_of(checkpoint)] and warm not in sink.places[0].parents
    says("warm", "--to", "unpacked", "web:1")  # which sweeps what nothing in the store is any more
    assert not warm.exists() and len(warm_unpacked._places()) == 1
    says("rm", "web:1")
    assert isinstance(cryoci("restore", "web:1", "--detach").exception, NotFoundError)


def test_nobody_removes_what_is_being_restored(warm: Path, sink: Engine) -> None:
    seen = []
    sink.look = lambda: seen.append(cryoci("warm", "--drop", "web:1").exception)
    says("restore", "web:1", "--detach")
    assert isinstance(seen[0], ConflictError) and warm.is_dir()


def test_what_cannot_lie_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    age.generate(tmp_path / "id.txt")
    public = (tmp_path / "id.txt").read_text().splitlines()[0].split(": ")[1]
    says("push", "--encrypt-to", public, str(checkpoint), "secret:1")
    assert isinstance(cryoci("warm", "--to", "unpacked", "secret:1").exception, UnsupportedError)
    assert warm_unpacked.usage() == ()
    assert isinstance(cryoci("warm", "--to", "unpacked", str(checkpoint)).exception, UsageError)
    assert isinstance(cryoci("warm", "--to", "unpacked", f"oci:{tmp_path}/x:1").exception, UsageError)
    assert isinstance(cryoci("warm", "--to", "unpacked", "web:1").exception, NotFoundError)
    assert warm_unpacked.base() == reference.default_store().parent / "unpacked"
