# SPDX-License-Identifier: Apache-2.0
"""create, run and delete: the bundle's edit, the container's record, and which runtime owns it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cryoci.errors import UsageError
from cryoci.shim import bundle, paths
from cryoci.shim.record import Record, all_records
from cryoci.shim.runtime import Runtime, numbers
from tests.unit.fake_runtime import FakeNode


@pytest.fixture(autouse=True)
def here(fake: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process looks at the fake node's state too."""
    monkeypatch.setitem(os.environb, b"CRYOCI_RUN", os.fsencode(fake.run_directory))
    import posix

    monkeypatch.setitem(posix.environ, b"CRYOCI_RUN", os.fsencode(fake.run_directory))


def annotation(directory: Path) -> str | None:
    """What the bundle's spec says for org.criu.config."""
    value = json.loads((directory / "config.json").read_text()).get("annotations", {}).get(bundle.ANNOTATION)
    assert value is None or isinstance(value, str)
    return value


@pytest.mark.parametrize("verb", ["create", "run"])
def test_create_edits_records_and_becomes_the_runtime(fake: FakeNode, verb: str) -> None:
    runc = fake.add("runc")
    directory = fake.bundle()
    before = (directory / "config.json").read_bytes()
    os.chmod(directory / "config.json", 0o640)
    words = ["--root", "/run/x/y", verb, "--bundle", str(directory), "--pid-file", "/p", "c1"]
    result = fake.call(*words, env={"FAKE_STATUS": "3"})
    assert (result.returncode, result.stderr) == (3, b"")
    assert fake.words == words
    record = fake.record("c1", "%2Frun%2Fx%2Fy")
    assert annotation(directory) == str(record / "criu.conf")
    assert (directory / "config.json.cryoci-orig").read_bytes() == before
    assert (directory / "config.json").stat().st_mode & 0o777 == 0o640
    assert (directory / "config.json.cryoci-orig").stat().st_mode & 0o777 == 0o640
    assert (record / "runtime").read_text() == f"{runc}\n"
    assert record.stat().st_mode & 0o777 == 0o700
    facts = json.loads((record / "record.json").read_text())
    assert facts["runtime_name"] == "runc" and facts["runtime_version"] == "1.1.15+ds1"
    assert (facts["id"], facts["bundle"], facts["root"], facts["version"]) == (
        "c1",
        str(directory),
        "/run/x/y",
        1,
    )
    assert facts["annotated"] is True and facts["pid_file"] == "/p"
    assert not list(directory.glob("*.tmp"))


def test_the_rest_of_the_spec_is_unchanged(fake: FakeNode) -> None:
    fake.add("runc")
    spec = {
        "process": {"rlimits": [{"hard": 18446744073709551615}], "env": ["A=ä\u2028"]},
        "x": [1.5, None, True, 1e300],
    }
    directory = fake.bundle(spec=spec)
    fake.call("create", "-b", str(directory), "c1")
    after = json.loads((directory / "config.json").read_text())
    del after["annotations"]
    assert after == spec


def test_second_create_changes_nothing_more(fake: FakeNode) -> None:
    fake.add("runc")
    directory = fake.bundle()
    before = (directory / "config.json").read_bytes()
    for _ in range(2):
        fake.call("create", "-b", str(directory), "c1")
    assert (directory / "config.json.cryoci-orig").read_bytes() == before


def test_a_users_own_annotation_stays(fake: FakeNode) -> None:
    fake.add("runc")
    for value in ("/etc/my.conf", ""):
        directory = fake.bundle(spec={"annotations": {bundle.ANNOTATION: value}})
        before = (directory / "config.json").read_bytes()
        fake.call("create", "-b", str(directory), "c1")
        assert (directory / "config.json").read_bytes() == before
        assert json.loads((fake.record("c1") / "record.json").read_text())["annotated"] is False


def test_annotation_of_another_node_is_replaced(fake: FakeNode) -> None:
    fake.add("runc")
    directory = fake.bundle(
        spec={"annotations": {bundle.ANNOTATION: "/run/cryoci/containers/default/old/criu.conf"}}
    )
    fake.call("create", "-b", str(directory), "c1")
    assert annotation(directory) == str(fake.record("c1") / "criu.conf")


@pytest.mark.parametrize(
    ("version", "libcriu", "there"),
    [((1, 21), False, True), ((1, 26), True, True), ((1, 26), False, False), ((1, 29, 1), False, False)],
)
def test_crun_that_refuses_the_annotation_gets_none(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], libcriu: bool, there: bool
) -> None:
    monkeypatch.setattr("cryoci.shim.runtime.libcriu_reads_files", lambda: libcriu)
    runtime = Runtime("/usr/bin/crun", "crun", ".".join(map(str, version)))
    for spec in ({}, {"annotations": {bundle.ANNOTATION: "/run/cryoci/containers/default/old/criu.conf"}}):
        bundle.criu_config(spec, bundle.Context(runtime, "/c"))
        assert (bundle.ANNOTATION in spec.get("annotations", {})) is there
    assert runtime.reads_annotation is (version >= (1, 26) and libcriu)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b'{"annotations": 3}', b"[" * 100_000])
def test_a_bundle_that_is_none_is_left_to_the_runtime(fake: FakeNode, content: bytes | None) -> None:
    fake.add("runc")
    directory = fake.bundle()
    (directory / "config.json").unlink()
    if content is not None:
        (directory / "config.json").write_bytes(content)
    result = fake.call(
        "create", "-b", str(directory), "c1", env={"FAKE_STATUS": "1", "FAKE_STDERR": "no spec"}
    )
    assert (result.returncode, result.stderr) == (1, b"no spec")
    assert content is None or (directory / "config.json").read_bytes() == content


@pytest.mark.parametrize("container", ["..", ".", "a/b", "a b", "ä", "../../x", "x" * 300])
def test_ids_that_are_no_ids_touch_nothing(fake: FakeNode, container: str) -> None:
    fake.add("runc")
    directory = fake.bundle()
    fake.call("create", "-b", str(directory), container)
    assert fake.words[-1] == container
    assert annotation(directory) is None
    assert not (fake.run_directory / "containers").exists()
    with pytest.raises(UsageError):
        Record(None, container)


def test_default_bundle_is_the_working_directory_and_crun_names_its_file(fake: FakeNode) -> None:
    fake.add("runc")
    directory = fake.bundle()
    fake.call("create", "c1", cwd=directory)
    assert annotation(directory)
    (fake.bin / "runc").unlink()
    fake.add("crun")
    (directory / "config.json").rename(directory / "other.json")
    fake.bundle()
    fake.call("create", "-b", str(directory), "-fother.json", "c2")
    assert annotation(directory) is None
    assert "c2" in (directory / "other.json").read_text()


def test_later_calls_go_to_the_runtime_that_created_the_container(fake: FakeNode) -> None:
    runc, crun = fake.add("runc"), fake.add("crun")
    fake.config.write_text('[runtime]\npath = "crun"\n')
    fake.call("--root", "/r", "create", "-b", str(fake.bundle()), "old")
    fake.config.write_text('[runtime]\npath = "runc"\n')
    for words in (["state", "old"], ["start", "old"], ["kill", "old", "9"], ["exec", "old", "ls"]):
        fake.call("--root", "/r/", *words)
        assert fake.calls[-1]["program"] == str(crun)
    fake.call("--root", "/r", "state", "new")
    assert fake.calls[-1]["program"] == str(runc)
    fake.call("state", "old")  # another root, another container
    assert fake.calls[-1]["program"] == str(runc)
    crun.unlink()
    fake.call("--root", "/r", "state", "old")
    assert fake.calls[-1]["program"] == str(runc)


def test_delete_removes_the_record_only_after_success(fake: FakeNode) -> None:
    fake.add("runc")
    fake.call("create", "-b", str(fake.bundle()), "c1")
    record = fake.record("c1")
    assert fake.call("delete", "c1", env={"FAKE_STATUS": "1"}).returncode == 1
    assert (record / "runtime").exists()
    result = fake.call("delete", "--force", "c1", env={"FAKE_STDOUT": "00ff"})
    assert (result.returncode, result.stdout) == (0, b"\x00\xff")
    assert not record.exists()
    assert fake.call("delete", "--force", "c1").returncode == 0


def test_delete_keeps_logs(fake: FakeNode) -> None:
    fake.add("runc")
    fake.call("create", "-b", str(fake.bundle()), "c1")
    (fake.record("c1") / "dump.log").write_text("x")
    fake.call("delete", "c1")
    assert [p.name for p in fake.record("c1").iterdir()] == ["dump.log"]
    assert not Record(None, "c1").exists


def test_only_the_newest_logs_are_kept(fake: FakeNode, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x")
    for n in range(40):
        record = Record(None, f"c{n}")
        record.keep_log("dump", str(log))
        os.utime(record.directory, (n, n))
        record.remove()
    left = sorted(int(p.name[1:]) for p in (fake.run_directory / "containers" / "default").iterdir())
    assert len(left) <= 33 and left[-1] == 39 and 0 not in left


def test_record_round_trip(fake: FakeNode) -> None:
    record = Record("/r", "c1")
    assert record.load() is None and all_records() == []
    record.save("/usr/sbin/runc", {"bundle": "/b"}, "timeout 3\n")
    record.set_options({"tcp-established": True})
    again = Record("/r", "c1").load()
    assert (
        again and again.facts["runtime"] == "/usr/sbin/runc" and again.options == {"tcp-established": True}
    )
    assert [r.facts["bundle"] for r in all_records()] == ["/b"]
    record.remove()
    record.remove()
    assert not Path(record.directory).exists()


def test_damaged_record_is_no_record(fake: FakeNode) -> None:
    runc = fake.add("runc")
    for junk in (b"", b"\xff\n", b"relative\n", b"/nonexistent\n", b"/" * 5000):
        directory = fake.record("c1")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "runtime").write_bytes(junk)
        (directory / "record.json").write_bytes(junk)
        assert Record(None, "c1").load() is None
        assert fake.call("state", "c1").returncode == 0
        assert fake.calls[-1]["program"] == str(runc)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_caller_that_may_not_keep_records_still_creates(fake: FakeNode) -> None:
    fake.add("runc")
    fake.run_directory.mkdir(mode=0o500)
    assert fake.call("create", "-b", str(fake.bundle()), "c1").returncode == 0


def test_a_state_directory_that_is_none_fails_with_the_reason(fake: FakeNode) -> None:
    fake.add("runc")
    fake.run_directory.write_text("")
    result = fake.call("create", "-b", str(fake.bundle()), "c1")
    assert result.returncode == 1 and fake.calls == []
    assert b"cannot write the container's record" in result.stderr and b"hint:" in result.stderr
    assert fake.call("state", "c1").returncode == 0


@pytest.mark.parametrize(
    ("root", "key"),
    [
        (None, "default"),
        ("", "default"),
        ("/run/runc", "default"),
        ("/run/crun/", "default"),
        ("/run//containerd/./runc/../runc/k8s.io", "%2Frun%2Fcontainerd%2Frunc%2Fk8s.io"),
        ("/a%2Fb", "%2Fa%252Fb"),
        ("/ä", "%2F%C3%A4"),
        ("/..", "%2F"),
    ],
)
def test_root_keys(root: str | None, key: str) -> None:
    assert paths.root_key(root) == key


def test_root_keys_are_file_names() -> None:
    assert len(paths.root_key("/" + "x/" * 3000)) < 256
    assert paths.root_key("r") == paths.quote(os.getcwd() + "/r")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1.1.15+ds1", (1, 1, 15)), ("1.21", (1, 21)), ("1.5.0-rc.3", (1, 5, 0)), ("x", ()), ("", ())],
)
def test_version_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert numbers(text) == expected
