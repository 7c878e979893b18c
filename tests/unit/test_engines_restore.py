# SPDX-License-Identifier: Apache-2.0
"""Restore: what a directory says of itself, and a bare restore that fails leaves nothing."""

from __future__ import annotations

import json
import os
import posix
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cryoci import files
from cryoci.errors import (
    ConflictError,
    ImageError,
    NotFoundError,
    PrivilegeError,
    RestoreError,
    UnsupportedError,
    UsageError,
)
from cryoci.shim import handover, paths, rootfs
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.engines import restore_podman
from cryoci.shim.engines.options import RestoreOptions
from cryoci.shim.engines.restore import carried, describe, restore
from tests.unit.live_runtime import LiveRuntime, running

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="a restore needs root")
LOG = (Path(__file__).parents[1] / "fixtures/criu-logs/port-taken.restore.log").read_text()


def write(directory: Path, name: str, value: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(value if isinstance(value, str) else json.dumps(value))


# -- what a directory says


def test_describe_own(tmp_path: Path) -> None:
    own = {"version": 1, "engine": "crun", "annotations": {"host.arch": "x"}, "criu": {}}
    write(tmp_path, "cryoci.json", own)
    assert describe(tmp_path) == own


@pytest.mark.parametrize(
    ("manager", "engine"),
    [("libpod", "podman"), ("cri-o", "cri-o"), ("other", "unknown"), (5, "unknown"), (None, "unknown")],
)
def test_describe_made_without_cryoci(tmp_path: Path, manager: object, engine: str) -> None:
    write(tmp_path, "spec.dump", {"annotations": {"io.container.manager": manager}})
    assert describe(tmp_path) == {"engine": engine, "annotations": {}}


def test_describe_nothing(tmp_path: Path) -> None:
    assert describe(tmp_path) == {"engine": "unknown", "annotations": {}}


@pytest.mark.parametrize("name", ["cryoci.json", "spec.dump"])
@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"])
def test_describe_no_json(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ImageError, match=name):
        describe(tmp_path)


@pytest.mark.parametrize("value", [[], {}, {"version": 2}, {"version": "1"}, None])
def test_describe_another_version(tmp_path: Path, value: object) -> None:
    write(tmp_path, "cryoci.json", value)
    with pytest.raises(ImageError) as caught:
        describe(tmp_path)
    assert caught.value.hint == "upgrade cryoci"


def test_carried() -> None:
    criu = {
        "tcp-established": True, "file-locks": True, "shell-job": False, "ext-unix-sk": "yes",
        "libdir": "/evil", "external": ["mnt[/etc]:x"], "network-lock": "skip",
    }  # fmt: skip
    assert carried({"criu": criu}) == {"tcp-established": True, "file-locks": True}
    assert carried({"criu": ["tcp-established"]}) == carried({}) == {}


# -- bare runtimes


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with running(tmp_path, monkeypatch) as made:
        for name, value in {"TMPDIR": str(tmp_path / "scratch")}.items():
            monkeypatch.setenv(name, value)
        made.set_status("gone")
        yield made


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bundles are made: not in /var/lib of this host."""
    where = tmp_path / "bundles"
    monkeypatch.setattr(paths, "bundle_directory", lambda root, container: f"{where}/{container}")
    return where


@pytest.fixture
def saved(live: LiveRuntime, tmp_path: Path) -> Path:
    """A checkpoint of the fake runtime's container."""
    directory = tmp_path / "saved"
    (directory / "checkpoint").mkdir(parents=True)
    write(directory, "cryoci.json", {"version": 1, "engine": "runc", "container": {"id": "web"}})
    write(directory, "spec.dump", live.spec)
    rootfs.save_all(live.bundle / "rootfs", [], directory / "rootfs.tar")
    return directory


def nothing_left(live: LiveRuntime, bundles: Path) -> None:
    assert not bundles.exists() or list(bundles.iterdir()) == []
    assert not (Path(paths.container_directory(None, "web")) / "runtime").exists()
    assert live.status == "gone"


@root_only
def test_bare(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    done = restore(saved, RestoreOptions())
    assert (done.engine, done.id, done.status) == ("runc", "web", None)
    assert live.status == "running"
    assert (bundles / "web/rootfs/data/file").read_text() == "file"
    spec = json.loads((bundles / "web/config.json").read_text())
    assert spec["root"] == {"path": "rootfs", "readonly": False}
    assert "cgroupsPath" not in spec["linux"]
    assert "--detach" in live.words("restore")


@root_only
def test_another_name_and_engine(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    """A podman checkpoint under a bare runtime: the engine that was asked for decides."""
    write(saved, "cryoci.json", {"version": 1, "engine": "podman", "container": {"id": "ab" * 32}})
    done = restore(saved, RestoreOptions(engine="runc", name="web2"))
    assert (done.engine, done.name) == ("runc", "web2")
    assert (bundles / "web2").is_dir()


@root_only
def test_a_failed_restore_leaves_nothing(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    live.wish(restore={"log": LOG, "status": 1})
    with pytest.raises(RestoreError) as caught:
        restore(saved, RestoreOptions())
    assert caught.value.message.endswith("a TCP or UDP port of the container is taken on this node")
    assert Path(str(caught.value.hint).rpartition("log: ")[2].rstrip(")")).is_file()
    assert live.verbs[-1] == "delete"
    nothing_left(live, bundles)


@root_only
def test_success_is_probed(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    live.wish(restore={"status": 0})
    with pytest.raises(RestoreError, match="reports success, but container web is not there"):
        restore(saved, RestoreOptions())
    nothing_left(live, bundles)


@root_only
def test_an_interrupt_leaves_nothing(
    live: LiveRuntime, saved: Path, bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime has made the container when Ctrl-C comes."""
    real = subprocess.run

    def interrupted(argv: list[str], **more: Any) -> Any:
        result = real(argv, **more)
        if "restore" in argv:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(saved, RestoreOptions())
    assert live.verbs == ["restore", "delete"]
    nothing_left(live, bundles)


@root_only
def test_a_damaged_file_system_leaves_nothing(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    (saved / "rootfs.tar").write_bytes((saved / "rootfs.tar").read_bytes()[:700])
    with pytest.raises(RestoreError, match="file system could not be written"):
        restore(saved, RestoreOptions())
    nothing_left(live, bundles)
    assert "restore" not in live.verbs


@root_only
def test_a_hostile_spec_leaves_nothing(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    evil = {"destination": "/host", "type": "bind", "source": "/", "options": ["rbind"]}
    write(saved, "spec.dump", {**live.spec, "mounts": [evil]})
    with pytest.raises(RestoreError, match="/ on /host"):
        restore(saved, RestoreOptions())
    nothing_left(live, bundles)
    restore(saved, RestoreOptions(allow=("mounts",)))
    assert live.status == "running"


@root_only
def test_the_name_is_taken(live: LiveRuntime, saved: Path, bundles: Path) -> None:
    live.set_status("running")
    with pytest.raises(ConflictError, match="container web exists"):
        restore(saved, RestoreOptions())
    assert live.status == "running" and not bundles.exists()


@root_only
@pytest.mark.parametrize("name", ["../../etc", "a/b", "x" * 300])
def test_no_id(live: LiveRuntime, saved: Path, bundles: Path, name: str) -> None:
    with pytest.raises(UsageError):
        restore(saved, RestoreOptions(name=name))
    write(saved, "cryoci.json", {"version": 1, "engine": "runc", "container": {"id": name}})
    with pytest.raises(UsageError):
        restore(saved, RestoreOptions())
    assert not bundles.exists()


@root_only
@pytest.mark.parametrize("name", ["spec.dump", "rootfs.tar"])
def test_a_missing_part(live: LiveRuntime, saved: Path, bundles: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises((ImageError, NotFoundError)):
        restore(saved, RestoreOptions())
    nothing_left(live, bundles)


@root_only
def test_an_operators_bundle_gets_the_changes(live: LiveRuntime, saved: Path, tmp_path: Path) -> None:
    rootfs.save_tree(live.bundle / "rootfs/data", saved / "rootfs-diff.tar")
    (saved / "rootfs.tar").unlink()
    write(saved, "deleted.files", ["/old"])
    bundle = tmp_path / "operators"
    (bundle / "rootfs").mkdir(parents=True)
    (bundle / "rootfs/old").write_text("old")
    write(bundle, "config.json", {"root": {"path": "rootfs"}, "process": {}})
    restore(saved, RestoreOptions(bundle=bundle))
    assert sorted(p.name for p in (bundle / "rootfs").iterdir()) == ["file"]
    live.set_status("gone")
    write(bundle, "config.json", {"root": {}})
    with pytest.raises(NotFoundError, match="not an OCI bundle"):
        restore(saved, RestoreOptions(bundle=bundle))


@root_only
def test_refusals(live: LiveRuntime, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"version": 1, "engine": "runc", "annotations": {"host.arch": "riscv128"}}
    write(saved, "cryoci.json", own)
    with pytest.raises(UnsupportedError, match="of a riscv128 machine"):
        restore(saved, RestoreOptions())
    write(saved, "cryoci.json", {"version": 1, "engine": "cri-o"})
    with pytest.raises(UnsupportedError, match="under cri-o"):
        restore(saved, RestoreOptions())
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError):
        restore(saved, RestoreOptions())


@root_only
def test_without_criu(live: LiveRuntime, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live.program.with_name("criu").write_text("#!/bin/sh\necho Version: 3.11\n")
    with pytest.raises(UnsupportedError, match=r"criu 3\.11\.0 .* is too old"):
        restore(saved, RestoreOptions())
    assert posix.environ  # the search is by the real environment


# -- podman: a fake one that answers what it is asked

PODMAN = """#!/bin/sh
echo "$*" >>{base}/podman-calls
case "$*" in
    info*) echo '{{"store": {{"volumePath": "{base}/volumes", "graphRoot": "{base}/storage"}}}}' ;;
    "volume exists"*) grep -qxF -- "$4" {base}/exists ;;
    "image inspect"*json*)
        grep -qx {image} {base}/exists || exit 1
        echo '{image} ["i"] [] {{"UpperDir": "{base}/storage/overlay/1/diff"}}' ;;
    "image inspect"*) echo {image} ;;
    *pull*) exit {pull} ;;
    ps*) while read line; do echo "$line name-$line"; echo "id-$line $line"; done <{base}/exists ;;
    "container restore"*)
        tar --list --file "${{3#--import=}}" >{base}/archive
        [ ! -e {base}/meanwhile ] || cat {base}/meanwhile >>{base}/exists
        echo 'Error: it cannot be' >&2; exit 125 ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def podman(live: LiveRuntime, tmp_path: Path) -> Path:
    program = live.program.with_name("podman")
    program.write_text(PODMAN.format(base=tmp_path, image="cd" * 32, pull=0))
    program.chmod(0o755)
    (tmp_path / "exists").write_text("cd" * 32 + "\n")
    (tmp_path / "storage/overlay-containers").mkdir(parents=True)
    return program


@pytest.fixture
def of_podman(live: LiveRuntime, tmp_path: Path) -> Path:
    directory = tmp_path / "scratch" / "of-podman"
    (directory / "checkpoint").mkdir(parents=True)
    write(directory, "cryoci.json", {"version": 1, "engine": "podman"})
    config = {"id": "ab" * 32, "name": "web", "rootfsImageID": "cd" * 32, "rootfsImageName": "img"}
    write(directory, "config.dump", {**config, "spec": live.spec})
    return directory


@root_only
@pytest.mark.parametrize("store", ["its own", "of images alone"])
def test_podman_refuses(of_podman: Path, podman: Path, tmp_path: Path, store: str) -> None:
    if store == "its own":
        with closing(sqlite3.connect(tmp_path / "storage/db.sql")) as made, made:
            made.execute("CREATE TABLE DBConfig (GraphRoot, VolumeDir)")
            made.execute("INSERT INTO DBConfig VALUES (?, ?)", (str(tmp_path / "storage"), "/volumes"))
    with pytest.raises(RestoreError, match=r"podman could not restore web: .*it cannot be"):
        restore(of_podman, RestoreOptions())
    assert [p.name for p in of_podman.parent.glob("*.tar")] == [], "the archive made for podman is gone"
    calls = (tmp_path / "podman-calls").read_text()
    assert "container restore" in calls and ("info" in calls) == (store != "its own")


@root_only
def test_a_failed_import_takes_nobody_elses_container_along(
    of_podman: Path, podman: Path, tmp_path: Path
) -> None:
    (tmp_path / "meanwhile").write_text("web\nstranger\n")
    with pytest.raises(RestoreError):
        restore(of_podman, RestoreOptions())
    calls = (tmp_path / "podman-calls").read_text()
    assert "rm --force --time=0 -- id-web" in calls and "stranger" not in calls


@root_only
@pytest.mark.parametrize("runtime", ["cryoci-runtime", "runc"])
def test_podman_gets_no_memory_that_its_runtime_links(
    of_podman: Path, podman: Path, tmp_path: Path, runtime: str
) -> None:
    (of_podman / "checkpoint/pages-1.img").write_bytes(bytes(handover.LEAST))
    of_podman.chmod(0o700)
    (of_podman / "checkpoint").chmod(0o700)
    with pytest.raises(RestoreError):
        restore(of_podman, RestoreOptions(runtime=runtime))
    listed = (tmp_path / "archive").read_text().splitlines()
    assert ("checkpoint/pages-1.img" in listed) == (runtime == "runc") and "spec.dump" in listed
    assert list((tmp_path / "run/handover").glob("*")) == []


@root_only
@pytest.mark.parametrize("taken", ["web", "ab" * 32])
def test_podman_name_taken(of_podman: Path, podman: Path, tmp_path: Path, taken: str) -> None:
    (tmp_path / "exists").write_text(taken + "\n")
    with pytest.raises(ConflictError):
        restore(of_podman, RestoreOptions())
    assert "container restore" not in (tmp_path / "podman-calls").read_text()


@root_only
def test_podman_base_image_unknown(of_podman: Path, podman: Path, tmp_path: Path) -> None:
    (tmp_path / "exists").write_text("")
    with pytest.raises(NotFoundError, match="names no registry that has it"):
        restore(of_podman, RestoreOptions())
    for reference in ("--evil@sha256:0", "img:latest", 5):
        own = {"version": 1, "engine": "podman", "annotations": {"image.reference": reference}}
        write(of_podman, "cryoci.json", own)
        with pytest.raises(NotFoundError):
            restore(of_podman, RestoreOptions())
    assert "pull" not in (tmp_path / "podman-calls").read_text()
    own = {"version": 1, "engine": "podman", "annotations": {"image.reference": "r/img@sha256:0"}}
    write(of_podman, "cryoci.json", own)
    with pytest.raises(RestoreError, match="is not the base image"):
        restore(of_podman, RestoreOptions())
    assert "pull --quiet -- r/img@sha256:0" in (tmp_path / "podman-calls").read_text()


@root_only
@pytest.mark.parametrize("text", [None, "", "[", "[]", "{}"])
def test_podman_config_that_is_none(of_podman: Path, podman: Path, text: str | None) -> None:
    (of_podman / "config.dump").unlink()
    if text is not None:
        write(of_podman, "config.dump", text)
    with pytest.raises(ImageError):
        restore(of_podman, RestoreOptions())


def test_podman_flags() -> None:
    options = CriuOptions(tcp_established=True, file_locks=False, shell_job=True, tcp_close=True)
    assert restore_podman._flags(options) == ["--tcp-established", "--tcp-close"]


def test_scratch_is_where_the_tests_want_it(live: LiveRuntime, tmp_path: Path) -> None:
    with files.scratch("x.") as place:
        assert place.is_relative_to(tmp_path)
