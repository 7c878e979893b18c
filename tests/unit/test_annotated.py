# SPDX-License-Identifier: Apache-2.0
"""Annotated create without engines: who asks for what, what fits, what a waiting container says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import CryociError, ImageError, RestoreError, UnsupportedError, UsageError
from cryoci.ociimage import fetch as fetching
from cryoci.shim.annotated import fetch, files, fit, hold, request
from cryoci.shim.criu import core
from tests.unit.fake_runtime import FakeNode
from tests.unit.images import make_checkpoint

PLAIN, PATH = request.PLAIN, request.PATH
CRIO = {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.container.name": "app"}
CONTAINERD = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "app"}


@pytest.mark.parametrize(
    ("noted", "key"),
    [
        ({PLAIN: "r.example/a:1"}, PLAIN),
        ({PATH + "web": "/a.tar"}, PATH + "web"),
        ({PLAIN + ".web": "r.example/a:1", PLAIN: "r.example/b:1"}, PLAIN),
        ({**CRIO, PLAIN: "r.example/a:1", PLAIN + ".app": "r.example/b:1"}, PLAIN + ".app"),
        ({**CONTAINERD, PLAIN + ".app": "r.example/b:1", PATH + "app": "/a.tar"}, PLAIN + ".app"),
        ({**CONTAINERD, PATH + "app": "/a.tar"}, PATH + "app"),
        ({**CONTAINERD, PATH + "other": "/a.tar", PLAIN + ".other": "r.example/b:1"}, None),
        ({**CRIO, "io.kubernetes.cri-o.ContainerType": "sandbox", PLAIN: "r.example/a:1"}, None),
        ({"io.kubernetes.cri.container-type": "sandbox", PLAIN: "r.example/a:1"}, None),
        ({"other": "x"}, None),
        ({PLAIN: 7}, None),
    ],
)
def test_which_annotation_counts(noted: dict[str, Any], key: str | None) -> None:
    found = request.find(noted)
    assert (found.key if found else None) == key
    assert found is None or found.reference == noted[str(key)]


def test_the_pod_of_a_container_is_known() -> None:
    for name in ("io.kubernetes.pod.namespace", "io.kubernetes.cri.sandbox-namespace"):
        found = request.find({PLAIN: "r.example/a:1", name: "team"})
        assert found is not None and found.pod_namespace == "team"
    found = request.find({PLAIN: "r.example/a:1"})
    assert found is not None and found.pod_namespace is None


@pytest.mark.parametrize(
    "noted",
    [
        {PLAIN: ""},
        {PLAIN: "./here"},
        {PLAIN: "../../there"},
        {PLAIN: "--help"},
        {PATH + "web": "relative.tar"},
        {PATH + "web": "/a.tar", PATH + "db": "/b.tar"},
    ],
)
def test_annotations_that_name_nothing(noted: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        request.find(noted)
    assert caught.value.hint


def kubelet(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    monkeypatch.setattr(fetching, "KUBELET", directory)
    return directory


def archive_of(checkpoint: Path, path: Path, namespace: str) -> Path:
    """An archive of `checkpoint` as kubelet has CRI-O write it, of a pod in `namespace`."""
    spec = json.loads((checkpoint / "spec.dump").read_text())
    spec.setdefault("annotations", {})["io.kubernetes.pod.namespace"] = namespace
    (checkpoint / "spec.dump").write_text(json.dumps(spec))
    subprocess.run(["tar", "-cf", path, "-C", checkpoint, "."], check=True)
    return path


def test_a_directory_is_fetched_by_checking_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    found = fetching.fetch(str(checkpoint), tmp_path / "out")
    assert found.directory == checkpoint and found.digest == "" and not (tmp_path / "out").exists()
    (checkpoint / "stranger").write_text("")
    with pytest.raises(ImageError):
        fetching.fetch(str(checkpoint), tmp_path / "out")


def test_a_pod_gets_archives_of_its_namespace_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "c")
    (tmp_path / "kubelet").mkdir()
    home = kubelet(monkeypatch, tmp_path / "kubelet")
    archive = archive_of(checkpoint, home / "checkpoint-a.tar", "team")
    found = fetching.fetch(str(archive), tmp_path / "out", pod_namespace="team")
    assert found.directory == tmp_path / "out" and found.facts["pod.namespace"] == "team"
    with pytest.raises(RestoreError, match="from namespace team, and the pod is in other"):
        fetching.fetch(str(archive), tmp_path / "out2", pod_namespace="other")


@pytest.mark.parametrize(
    "text", ["{c}", "name:1", "oci:{c}:1", "{c}/x.tar", "{home}/link.tar", "{home}/../x.tar"]
)
def test_a_pod_gets_no_file_of_the_node(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kubelet").mkdir()
    home = kubelet(monkeypatch, tmp_path / "kubelet")
    (home / "link.tar").symlink_to(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(RestoreError, match="a pod may not restore"):
        fetching.fetch(text.format(c=tmp_path, home=home), tmp_path / "out", pod_namespace="team")


def test_what_the_command_line_says_reaches_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'#!/bin/sh\nexec {sys.executable} -m cryoci.cli.main "$@"\n'
    program = tmp_path / "cryoci"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setattr(fetch, "program", lambda: str(program))
    checkpoint = make_checkpoint(tmp_path / "c")
    got = fetch.fetch(request.Request(PLAIN, str(checkpoint), None), tmp_path / "out")
    assert got.directory == checkpoint and got.images == checkpoint / "checkpoint"
    with pytest.raises(RestoreError) as caught:
        fetch.fetch(request.Request(PLAIN, str(checkpoint), "team"), tmp_path / "out")
    assert "a pod may not restore" in caught.value.message and PLAIN in caught.value.message
    assert caught.value.hint and "registry" in caught.value.hint


def spec(**linux: Any) -> dict[str, Any]:
    namespaces = [{"type": kind} for kind in ("pid", "network", "mount")]
    return {
        "process": {"terminal": False},
        "mounts": [{"destination": "/proc", "type": "proc"}],
        "linux": {"namespaces": namespaces, **linux},
    }


def checkpoint_of(directory: Path, old: Any, **facts: str) -> fetch.Checkpoint:
    directory.mkdir(exist_ok=True)
    (directory / "spec.dump").write_text(old if isinstance(old, str) else json.dumps(old))
    return fetch.Checkpoint(directory, "", {key.replace("_", "."): value for key, value in facts.items()})


BIND = {"destination": "/data/", "type": "bind", "source": "/srv", "options": ["rbind"]}
SHM = {"destination": "/dev/shm", "type": "tmpfs"}


def test_the_same_fits(tmp_path: Path) -> None:
    old = {**spec(), "mounts": [BIND, {"destination": "/proc", "type": "proc"}]}
    new = {
        **spec(),
        "mounts": [{"destination": "/proc", "type": "proc"}, SHM, {**BIND, "destination": "/data"}],
    }
    fit.check(new, checkpoint_of(tmp_path / "c", old, host_arch=os.uname().machine), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mounts": [BIND]}, "cannot see: /data"),
        ({"mounts": []}, "does not get: /proc"),
        ({"process": {"terminal": True}}, "gets one"),
        (
            {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}]}},
            "network",
        ),
        ({"linux": {"namespaces": [{"type": "network"}]}}, "pid namespace"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    new = {**spec(), **change}
    if "mounts" in change:
        new["mounts"] = [*spec()["mounts"], *change["mounts"]] if change["mounts"] else []
    with pytest.raises(RestoreError, match=said) as caught:
        fit.check(new, checkpoint_of(tmp_path / "c", spec()), str(tmp_path))
    assert caught.value.hint


def test_a_user_namespace_is_refused(tmp_path: Path) -> None:
    with_user = spec(namespaces=[*spec()["linux"]["namespaces"], {"type": "user"}])
    for old, new in ((spec(), with_user), (with_user, spec()), (with_user, with_user)):
        with pytest.raises(UnsupportedError, match="user namespace"):
            fit.check(new, checkpoint_of(tmp_path / "c", old), str(tmp_path))


def test_another_machine_and_a_broken_description(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="z80"):
        fit.check(spec(), checkpoint_of(tmp_path / "a", spec(), host_arch="z80"), str(tmp_path))
    for text in ("[]", "{", "[" * 100000):
        with pytest.raises(ImageError):
            fit.check(spec(), checkpoint_of(tmp_path / "b", text), str(tmp_path))


def test_the_base_image_is_compared_where_the_engine_tells(tmp_path: Path) -> None:
    one, two = "1" * 64, "2" * 64
    bundle = tmp_path / "overlay-containers" / "c1" / "userdata"
    bundle.mkdir(parents=True)
    (tmp_path / "overlay-containers" / "containers.json").write_text(
        json.dumps([{"id": "c1", "image": one}])
    )
    assert fit.base_image({}, str(bundle)) == one
    noted = {"annotations": {"io.kubernetes.cri.image-name": f"r.example/a@sha256:{two}"}}
    assert fit.base_image(noted, str(bundle)) == f"sha256:{two}"
    assert fit.base_image({"annotations": {"io.kubernetes.cri.image-name": "a:1"}}, str(bundle)) is None
    fit.check(spec(), checkpoint_of(tmp_path / "c", spec(), image_id=one), str(bundle))
    with pytest.raises(RestoreError, match="was made on 2222"):
        fit.check(spec(), checkpoint_of(tmp_path / "c", spec(), image_id=two), str(bundle))
    fit.check(spec(), checkpoint_of(tmp_path / "c", spec(), image_id=two), str(tmp_path))  # nobody knows


def test_a_volume_gets_content_only_when_it_is_empty_and_writable(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("carried")
    volumes = tmp_path / "c" / "volumes"
    volumes.mkdir(parents=True)
    subprocess.run(["tar", "-cf", volumes / "data.tar", "-C", source, "."], check=True)
    named = [{"volumeName": "data", "dest": "/data"}, {"volumeName": "../data", "dest": "/evil"}]
    (tmp_path / "c" / "config.dump").write_text(json.dumps({"namedVolumes": named}))
    root = tmp_path / "root"
    root.mkdir()
    for name, options, before, after in (
        ("empty", ["rbind"], [], ["file"]),
        ("full", ["rbind"], ["own"], ["own"]),
        ("readonly", ["rbind", "ro"], [], []),
    ):
        volume = tmp_path / name
        volume.mkdir()
        for one in before:
            (volume / one).write_text("")
        mount = {"destination": "/data", "type": "bind", "source": str(volume), "options": options}
        files.apply(fetch.Checkpoint(tmp_path / "c", "", {}), root, {"mounts": [mount]})
        assert sorted(path.name for path in volume.iterdir()) == after


def test_a_compressed_layer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rootfs-diff.tar").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UnsupportedError, match="compressed with zstd"):
        files.apply(fetch.Checkpoint(tmp_path, "", {}), tmp_path, {})


def image(state: int) -> bytes:
    """A core image of a process in `state`: a message with a fixed64 and an unknown varint before tc."""
    task = bytes([0x08, state, 0x10, 0x00])
    message = bytes([0x08, 0x01, 0x21, *range(8), 0x1A, len(task), *task])
    head = b"".join(n.to_bytes(4, "little") for n in (0x54564319, 0x55053847, len(message)))
    return head + message


def test_stopped_processes_of_a_checkpoint(tmp_path: Path) -> None:
    for name, data in {
        "core-1.img": image(1),
        "core-7.img": image(3),
        "core-8.img": image(3)[:14],
        "core-9.img": b"",
        "core-10.img": bytes(100),
        "pstree.img": image(3),
    }.items():
        (tmp_path / name).write_bytes(data)
    assert core.stopped(tmp_path) == {7}


def test_what_restored_processes_may_do(tmp_path: Path) -> None:
    process = subprocess.Popen(["setpriv", "--bounding-set=-all,+chown", "--inh-caps=-all", "sleep", "60"])
    try:
        while not Path(f"/proc/{process.pid}/cmdline").read_text().startswith("sleep"):
            time.sleep(0.01)
        hold.check(process.pid, {"process": {"capabilities": {"bounding": ["CAP_CHOWN", "CAP_NEW"]}}})
        hold.check(process.pid, {"process": {}})
        for given, said in (
            ({"process": {"capabilities": {"bounding": ["CAP_KILL"]}}}, "does not get: CHOWN"),
            ({"process": {}, "linux": {"seccomp": {"defaultAction": "x"}}}, "no seccomp filter"),
            ({"process": {"noNewPrivileges": True}}, "gain privileges"),
        ):
            with pytest.raises(RestoreError, match=said):
                hold.check(process.pid, given)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def waiting(fake: FakeNode) -> FakeNode:
    """Container c1 of runc, restored and not started."""
    fake.add("runc")
    fake.call("create", "-b", str(fake.bundle()), "c1")
    fake.calls_file.unlink()
    (fake.record("c1") / "waiting").write_text("r.example/a:1\n")
    return fake


def test_a_waiting_container_is_created_to_engines(waiting: FakeNode) -> None:
    paused = b'{\n  "id": "c1",\n  "status": "paused"\n}'
    result = waiting.call("--root", "/run/runc", "state", "c1", env={"FAKE_STDOUT": paused.hex()})
    assert result.stdout == paused.replace(b"paused", b"created") and result.returncode == 0
    assert waiting.words == ["--root", "/run/runc", "state", "c1"]
    stopped = paused.replace(b"paused", b"stopped")
    assert waiting.call("state", "c1", env={"FAKE_STDOUT": stopped.hex()}).stdout == stopped
    assert waiting.call("state", "c1", env={"FAKE_STATUS": "3"}).returncode == 3


def test_start_lets_it_run_once(waiting: FakeNode) -> None:
    assert waiting.call("--log", "/l", "start", "c1", env={"FAKE_STATUS": "1"}).returncode == 1
    assert (waiting.record("c1") / "waiting").exists()
    assert waiting.call("--log", "/l", "start", "c1").returncode == 0
    assert waiting.words == ["--log", "/l", "resume", "c1"]
    assert not (waiting.record("c1") / "waiting").exists()
    waiting.call("start", "c1")
    assert waiting.words == ["start", "c1"]


def test_other_verbs_while_it_waits(waiting: FakeNode) -> None:
    for verb in ("pause", "resume"):
        result = waiting.call(verb, "c1")
        assert result.returncode == 1 and b"not started" in result.stderr
    assert waiting.calls == []
    waiting.call("kill", "c1", "9")
    assert waiting.words == ["kill", "c1", "9"]
    waiting.call("ps", "--format", "json", "c1")
    assert waiting.words == ["ps", "--format", "json", "c1"]
    waiting.call("delete", "c1")
    assert waiting.words == ["delete", "--force", "c1"]
    assert not waiting.record("c1").exists()


def test_only_create_restores(fake: FakeNode) -> None:
    fake.add("runc")
    fake.add("criu")
    bundle = fake.bundle(
        spec={"annotations": {PLAIN: "r.example/a:1"}, "process": {}, "root": {"path": "r"}}
    )
    before = (bundle / "config.json").read_bytes()
    for words in (["run"], ["create", "--preserve-fds", "2"], ["create", "--pidfd-socket", "/s"]):
        result = fake.call(*words, "-b", str(bundle), "c1")
        assert result.returncode == 1 and b"hint: " in result.stderr
    assert fake.calls == [] and not fake.record("c1").exists()
    assert (bundle / "config.json").read_bytes() == before


def test_a_container_that_exists_is_left_alone(waiting: FakeNode) -> None:
    bundle = waiting.bundle(
        spec={"annotations": {PLAIN: "r.example/a:1"}, "process": {}, "root": {"path": "r"}}
    )
    result = waiting.call("create", "-b", str(bundle), "c1")
    assert result.returncode == 1 and b"exists already" in result.stderr
    assert waiting.words == ["state", "c1"] and (waiting.record("c1") / "runtime").exists()


def test_a_sandbox_and_other_annotations_are_created_as_ever(fake: FakeNode) -> None:
    fake.add("runc")
    noted = {PLAIN: "r.example/a:1", "io.kubernetes.cri.container-type": "sandbox"}
    for value in (noted, {"text": f"see {PLAIN}"}):
        bundle = fake.bundle(spec={"annotations": value, "process": {}, "root": {"path": "r"}})
        assert fake.call("create", "-b", str(bundle), "c1").returncode == 0
        assert fake.words[0] == "create"


def test_the_program_beside_the_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3" / "site-packages" / "cryoci" / "shim" / "annotated"
    monkeypatch.setattr(fetch, "__file__", str(site / "fetch.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(CryociError, match="no program cryoci"):
        fetch.program()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cryoci").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "cryoci").chmod(0o755)
    assert fetch.program() == str(tmp_path / "bin" / "cryoci")
