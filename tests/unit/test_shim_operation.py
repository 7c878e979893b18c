# SPDX-License-Identifier: Apache-2.0
"""checkpoint and restore on fake runtimes: refusals, words, options, logs, and what is undone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.fake_runtime import FakeNode

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="checkpoint and restore refuse all users but root")

BROKEN = "(00.1) Error (criu/files-reg.c:1831): Can't lookup mount=-1 for fd=1 path=/tmp/out\n"


@pytest.fixture
def node(fake: FakeNode, request: pytest.FixtureRequest) -> FakeNode:
    """A node with one runtime (the test's parameter, default runc), criu, and container c1."""
    fake.add(getattr(request, "param", "runc"))
    fake.add("criu")
    fake.call("create", "-b", str(fake.bundle()), "c1")
    fake.calls_file.unlink()
    return fake


def checkpoint(node: FakeNode, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """One checkpoint that succeeds unless `env` says otherwise."""
    d = node.directory
    line = ["checkpoint", "--image-path", f"{d}/img", "--work-path", f"{d}/work/deep", *words, "c1"]
    return node.call(*line, env={"FAKE_IMAGE": "1", **env})


def restore(node: FakeNode, *words: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """One restore from ./img into ./bundle."""
    d = node.directory
    line = [
        "restore",
        "--detach",
        "--image-path",
        f"{d}/img",
        "--work-path",
        f"{d}/w/r",
        "--bundle",
        f"{d}/bundle",
    ]
    return node.call(*line, *words, "c1", env=env)


def test_checkpoint_leaves_facts_and_the_log(node: FakeNode) -> None:
    result = checkpoint(node, "--leave-running", "--leave-running", FAKE_LOG="fine\n")
    assert (result.returncode, result.stderr) == (0, b"")
    assert node.words[0] == "checkpoint" and node.words[-3:] == ["--leave-running", "--leave-running", "c1"]
    facts = json.loads((node.directory / "img" / "cryoci-runtime.json").read_text())
    assert (
        facts["runtime"] == "runc"
        and facts["criu_version"] == 40201
        and facts["kernel"] == os.uname().release
    )
    assert facts["edits"] == ["annotations.org.criu.config"] and facts["spec_digest"].startswith("sha256:")
    assert (node.record("c1") / "dump.log").read_text() == "fine\n"
    assert node.directory.joinpath("work/deep").stat().st_mode & 0o777 == 0o700


def test_options_reach_the_containers_criu_file(node: FakeNode) -> None:
    node.config.write_text('[criu]\nghost-limit = "2M"\nfile-locks = false\ntcp-close = true\n')
    (node.record("c1") / "options.json").write_text('{"timeout": 77, "tcp-close": false}')
    checkpoint(
        node, "--ghost-limit", "3M", "--external", "mnt[/a]:a", "--external=mnt[/b]:b", "--tcp-established"
    )
    conf = (node.record("c1") / "criu.conf").read_text().splitlines()
    assert set(conf[1:]) == {
        "no-tcp-close",
        "no-file-locks",
        "ghost-limit 3145728",
        "timeout 77",
        "external mnt[/a]:a",
        "external mnt[/b]:b",
    }
    assert not [w for w in node.words if "ghost" in w or "external" in w or "3M" in w or "mnt" in w]
    assert "--tcp-established" in node.words  # runc knows it
    assert not [w for w in node.calls[-1]["env"] if w.startswith("CRIU_CONFIG_FILE")]


@pytest.mark.parametrize("node", ["crun"], indirect=True)
def test_old_crun_gets_flags_and_the_variable(node: FakeNode) -> None:
    node.config.write_text(
        '[criu]\ntcp-established = true\nghost-limit = "2M"\nmanage-cgroups = "ignore"\nlink-remap = true\n'
        'network-lock = "skip"\n'
    )
    checkpoint(node, "--file-locks")
    words = node.words
    assert {"--tcp-established", "--file-locks"} <= set(words) and "--link-remap" not in words
    assert words[words.index("--manage-cgroups-mode") + 1] == "ignore"
    assert words[words.index("--network-lock") + 1] == "skip"
    assert f"CRIU_CONFIG_FILE={node.record('c1')}/criu.conf" in node.calls[-1]["env"]
    conf = (node.record("c1") / "criu.conf").read_text().splitlines()
    # attached: behind a blank CRIU would take its default instead, "soft"
    assert "link-remap" in conf and "manage-cgroups=ignore" in conf
    assert node.words[-1] == "c1"


def test_pre_dump_passes_through(node: FakeNode) -> None:
    checkpoint(node, "--pre-dump", "--parent-path", "../p")
    assert "--pre-dump" in node.words
    assert not (node.directory / "img" / "cryoci-runtime.json").exists()


def test_failure_is_explained_to_people_and_engines(node: FakeNode, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    d = node.directory
    line = [
        "--log-format=json",
        "--log",
        str(log),
        "checkpoint",
        "--image-path",
        f"{d}/i",
        "--work-path",
        f"{d}/w",
    ]
    env = {"FAKE_LOG": BROKEN, "FAKE_STATUS": "1", "FAKE_STDERR": "criu failed\n"}
    result = node.call(*line, "c1", env=env)
    assert result.returncode == 1
    kept = node.record("c1") / "dump.log"
    assert kept.read_text() == BROKEN
    first, ours, hint = result.stderr.decode().splitlines()
    assert first == "criu failed"
    assert ours.startswith("cryoci-runtime: checkpoint of c1 failed: ") and "/tmp/out" in ours
    assert hint.startswith("hint: ") and hint.endswith(str(kept))
    entry = json.loads(log.read_text().splitlines()[-1])
    assert entry["level"] == "error" and "/tmp/out" in entry["msg"]


def test_text_log_is_logrus_text(node: FakeNode, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (node.bin / "criu").unlink()
    node.call("--log", str(log), "checkpoint", "c1", env={"PATH": str(node.bin)})
    text = log.read_text() if log.exists() else ""
    if not text:
        pytest.skip("this machine has a criu in the directories that are always searched")
    assert text.startswith("time=") and " level=error msg=" in text


def test_a_log_of_an_earlier_attempt_explains_nothing(node: FakeNode) -> None:
    checkpoint(node, FAKE_LOG=BROKEN, FAKE_STATUS="1")
    result = checkpoint(node, FAKE_STATUS="1", FAKE_STDERR="container does not exist")
    assert result.stderr == b"container does not exist"


def test_success_without_an_image_is_a_failure(node: FakeNode) -> None:
    result = node.call("checkpoint", "--image-path", f"{node.directory}/img", "c1")
    assert result.returncode == 1
    assert b"holds no inventory.img" in result.stderr


@pytest.mark.parametrize(
    ("version", "reason"),
    [("Version: 3.15", b"criu 3.15.0"), ("Version: oops", b"holds no version")],
)
def test_criu_that_will_not_do(node: FakeNode, version: str, reason: bytes) -> None:
    node.add("criu", version)
    for result in (checkpoint(node), restore(node)):
        assert result.returncode == 1 and reason in result.stderr and b"hint: " in result.stderr
    assert node.calls == []


def test_criu_is_asked_once_per_binary(node: FakeNode) -> None:
    checkpoint(node)
    saved = json.loads((node.run_directory / "criu.json").read_text())
    assert saved["version"] == 40201
    node.add("criu", "Version: 3.15.9")  # replaced: another inode or time
    assert b"3.15.9" in checkpoint(node).stderr


def test_wrong_flag_values_are_refused(node: FakeNode) -> None:
    result = checkpoint(node, "--ghost-limit", "lots")
    assert result.returncode == 1 and b"ghost-limit is 'lots'" in result.stderr
    assert node.calls == []


def test_container_that_cryoci_did_not_create(node: FakeNode) -> None:
    d = node.directory
    node.call("checkpoint", "--image-path", f"{d}/img", "alien", env={"FAKE_IMAGE": "1"})
    assert f"CRIU_CONFIG_FILE={node.record('alien')}/criu.conf" in node.calls[-1]["env"]
    assert not (node.record("alien") / "runtime").exists()


def test_restore_prepares_bundle_record_and_words(node: FakeNode) -> None:
    node.call("delete", "c1")
    directory = node.bundle()
    result = restore(node, "-no-subreaper", "--tcp-close", "--no-new-keyring", FAKE_LOG="ok")
    assert (result.returncode, result.stderr) == (0, b"")
    assert "--tcp-close" not in node.words and "--no-new-keyring" not in node.words
    assert "-no-subreaper" in node.words  # runc knows it
    record = node.record("c1")
    assert "tcp-close" in (record / "criu.conf").read_text()
    assert str(record / "criu.conf") in (directory / "config.json").read_text()
    assert (record / "runtime").exists() and (record / "restore.log").read_text() == "ok"


@pytest.mark.parametrize("node", ["crun"], indirect=True)
def test_restore_drops_what_crun_does_not_know(node: FakeNode) -> None:
    restore(node, "-no-subreaper")
    assert "-no-subreaper" not in node.words and node.words[-1] == "c1"
    assert node.directory.joinpath("w/r").is_dir()


def test_failed_restore_is_undone(node: FakeNode) -> None:
    node.call("delete", "c1")
    directory = node.bundle()
    before = (directory / "config.json").read_bytes()
    result = restore(node, FAKE_STATUS="1", FAKE_LOG=BROKEN)
    assert result.returncode == 1 and b"restore of c1 failed" in result.stderr
    assert (directory / "config.json").read_bytes() == before
    assert [p.name for p in directory.iterdir()] == ["config.json"]
    assert sorted(p.name for p in node.record("c1").iterdir()) == ["restore-attempt.log", "restore.log"]


def test_restore_by_the_other_runtime_says_so(node: FakeNode) -> None:
    image = node.directory / "img"
    image.mkdir()
    (image / "cryoci-runtime.json").write_text('{"runtime": "crun"}')
    result = restore(node, FAKE_STATUS="1", FAKE_LOG=BROKEN)
    assert b"made by crun, and runc was asked" in result.stderr


def test_restore_without_a_bundle_is_left_to_the_runtime(node: FakeNode) -> None:
    result = node.call("restore", "--bundle", "/nonexistent", "c2", env={"FAKE_STATUS": "5"})
    assert result.returncode == 5
    assert not node.record("c2").exists()


def test_other_users_are_refused(node: FakeNode) -> None:
    # in a user namespace without a mapping this process is nobody, and still reaches its own files
    line = ["/usr/bin/unshare", "--user", str(node.launcher), "checkpoint", "c1"]
    result = subprocess.run(line, env=node.env, capture_output=True, timeout=20)
    assert result.returncode == 1 and b"needs root" in result.stderr
    assert node.calls == []
