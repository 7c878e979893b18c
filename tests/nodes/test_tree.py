# SPDX-License-Identifier: Apache-2.0
"""Building and caching of the tree and its layers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tarfile
from pathlib import Path

import pytest

from cryoci.errors import PrivilegeError
from tests.nodes import tree, workload

root = pytest.mark.skipif(os.geteuid() != 0, reason="building layers needs root")


def _build_slowly(cache: str, log: str) -> None:
    tree.CACHE = Path(cache)

    def build(path: Path) -> None:
        with open(log, "a") as f:
            f.write("built\n")
        path.mkdir()

    tree.cached("thing", build)


@root
def test_workers_build_a_thing_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_build_slowly, args=(str(tmp_path / "c"), str(log))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0, 0]
    assert log.read_text() == "built\n"


@root
def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "CACHE", tmp_path)

    def build(path: Path) -> None:
        (path / "half").mkdir(parents=True)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        tree.cached("thing", build)
    assert [p.name for p in tmp_path.iterdir()] == ["thing.lock"]


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tree, "CACHE", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError, match="need root"):
        tree.cached("thing", lambda path: path.mkdir())


def test_source_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "REPO", tmp_path)
    (tmp_path / "shim").mkdir()
    module = tmp_path / "shim" / "a.py"
    module.write_text("1")
    first = tree.source_digest()
    (tmp_path / "docs.md").write_text("not a source")
    assert tree.source_digest() == first
    module.write_text("2")
    assert tree.source_digest() != first


def test_image_is_a_valid_layout(tmp_path: Path) -> None:
    root_directory = tmp_path / "root"
    (root_directory / "etc").mkdir(parents=True)
    (root_directory / "etc" / "file").write_text("x")
    (root_directory / "link").symlink_to("etc/file")
    archives = [tmp_path / "1.tar", tmp_path / "2.tar"]
    for archive in archives:
        workload.image(root_directory, archive)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as tar:
        blobs = [m for m in tar if m.name.startswith("blobs/sha256/")]
        assert len(blobs) == 3
        for member in blobs:
            data = tar.extractfile(member)
            assert data is not None
            assert hashlib.sha256(data.read()).hexdigest() == member.name.rpartition("/")[2]
