# SPDX-License-Identifier: Apache-2.0
"""`cryoci warm --to tmpfs`: layers in a real tmpfs, found by pulls, bounded, and gone without a trace."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import ConflictError, IntegrityError, NotFoundError, SpaceError, UsageError
from cryoci.ociimage import nearby
from cryoci.uses import warm_memory
from tests.unit.commands import cryoci, says
from tests.unit.images import Proxy, checkpoint, no_credentials, proxy, registry, tree_of

__all__ = ["checkpoint", "no_credentials", "proxy", "registry"]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a tmpfs is mounted by root"),
    pytest.mark.usefixtures("no_credentials", "memory"),
]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The place of the tmpfs; whatever is mounted there at the end goes."""
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    place = nearby.base()
    assert place == tmp_path / "run/warm"
    yield place
    if place.is_mount():  # lazily: what a test caught may still hold a file open by its traceback
        subprocess.run(["umount", "--lazy", place], check=True)


def blobs(proxy: Proxy) -> list[str]:
    """Blobs that were downloaded through the proxy since the last call."""
    found = [path for method, path in proxy.log if method == "GET" and "/blobs/sha256:" in path]
    proxy.log.clear()
    return found


def test_layers_of_a_registry_come_from_memory(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, memory: Path
) -> None:
    ref, other = f"{proxy.host}/team/warm:1", f"{proxy.host}/team/other:1"
    for goal in (ref, other):
        says("push", str(checkpoint), goal)
    proxy.log.clear()
    one = json.loads(says("warm", "--json", "--to", "tmpfs", "--limit", "64M", ref))[0]
    assert one["place"] == "tmpfs" and one["name"] == ref and 0 < one["fetched"] == one["size"]
    assert memory.is_mount() and memory.stat().st_mode & 0o777 == 0o700
    proxy.log.clear()
    says("pull", ref, str(tmp_path / "out"))
    assert blobs(proxy) == [] and tree_of(tmp_path / "out") == tree_of(checkpoint)
    says("inspect", ref)
    assert blobs(proxy) == []
    says("pull", other, str(tmp_path / "other"))  # another repository's manifest names the same blobs
    assert len(blobs(proxy)) > 2
    assert json.loads(says("warm", "--json", "--to", "tmpfs", ref))[0]["fetched"] == 0
    assert blobs(proxy) == []
    listed = says("warm", "--list")
    assert ref in listed and one["digest"] in listed and "of 67.1 MB of memory" in listed
    assert json.loads(says("warm", "--list", "--json"))["images"][0]["size"] == one["size"]
    assert says("warm", "--drop", ref) == f"{ref}\n"
    assert not memory.is_mount() and not any(memory.iterdir())
    says("pull", ref, str(tmp_path / "again"))
    assert len(blobs(proxy)) > 2


def test_images_of_the_local_store(checkpoint: Path, tmp_path: Path, memory: Path) -> None:
    says("push", str(checkpoint), "web:1")
    assert (
        json.loads(says("warm", "--json", "--to", "tmpfs", "--limit", "64M", "web:1"))[0]["name"] == "web:1"
    )
    store = tmp_path / "store/blobs/sha256"
    big = max(store.iterdir(), key=lambda file: file.stat().st_size)
    big.write_bytes(b"the disk has lost it")
    says("pull", "web:1", str(tmp_path / "out"))
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert says("warm", "--drop") == "web:1\n" and says("warm", "--drop") == "nothing was warm\n"
    assert not memory.is_mount()
    assert isinstance(cryoci("pull", "web:1", str(tmp_path / "again")).exception, IntegrityError)


def test_memory_that_has_rotted_is_not_restored(checkpoint: Path, tmp_path: Path, memory: Path) -> None:
    says("push", str(checkpoint), "web:1")
    says("warm", "--to", "tmpfs", "--limit", "64M", "web:1")
    big = max(memory.rglob("blobs/sha256/*"), key=lambda file: file.stat().st_size)
    data = bytearray(big.read_bytes())
    data[len(data) // 2] ^= 1
    big.write_bytes(data)
    assert isinstance(cryoci("pull", "web:1", str(tmp_path / "out")).exception, IntegrityError)
    assert not (tmp_path / "out").exists()


def test_the_limit_counts_for_all(checkpoint: Path, memory: Path) -> None:
    says("push", str(checkpoint), "web:1")
    (checkpoint / "checkpoint/pages-2.img").write_bytes(os.urandom(20 << 20))
    says("push", str(checkpoint), "web:2")
    error = cryoci("warm", "--to", "tmpfs", "--limit", "2M", "web:1").exception
    assert isinstance(error, SpaceError) and "--limit" in (error.hint or "") and not memory.is_mount()
    says("warm", "--to", "tmpfs", "--limit", "12M", "web:1")
    error = cryoci("warm", "--to", "tmpfs", "web:2").exception
    assert isinstance(error, SpaceError) and "12 MiB for images in memory" in error.message
    assert [held.reference for held in warm_memory.usage().images] == ["web:1"]
    assert isinstance(cryoci("warm", "--to", "tmpfs", "--limit", "1M", "web:1").exception, SpaceError)
    says("warm", "--to", "tmpfs", "--limit", "48M", "web:2")  # of which it shares what web:1 has
    assert warm_memory.usage().limit == 48 << 20 and len(warm_memory.usage().images) == 2
    says("warm", "--drop", "web:1")
    assert [held.reference for held in warm_memory.usage().images] == ["web:2"]


def test_a_node_that_is_short_of_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, memory: Path
) -> None:
    says("push", str(checkpoint), "web:1")
    monkeypatch.setattr(warm_memory, "available_memory", lambda: 1 << 20)
    error = cryoci("warm", "--to", "tmpfs", "web:1").exception
    assert isinstance(error, SpaceError) and "0 MiB to give (1 available" in error.message
    assert not memory.is_mount()


def test_words_that_do_not_fit(checkpoint: Path, memory: Path) -> None:
    for words in (
        ["warm"],
        ["warm", "--list", "web:1"],
        ["warm", "--limit", "1G", "web:1"],
        ["warm", "--to", "tmpfs", str(checkpoint)],
        ["warm", "--to", "tmpfs", f"oci:{checkpoint}:x"],
        ["warm", "--drop", str(checkpoint)],
    ):
        assert isinstance(cryoci(*words).exception, UsageError), words
    assert isinstance(cryoci("warm", "--drop", "web:1").exception, NotFoundError)
    assert isinstance(cryoci("warm", "--to", "tmpfs", "web:1").exception, NotFoundError)
    assert says("warm", "--list").split() == ["IMAGE", "PLACE", "SIZE", "DIGEST"] and not memory.is_mount()
    with warm_memory._locked():
        assert isinstance(cryoci("warm", "--drop").exception, ConflictError)
