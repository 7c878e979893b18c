# SPDX-License-Identifier: Apache-2.0
"""The OCI hook: what it notes, that it forgets, and that it never fails a container."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cryoci.ociimage import annotations as families
from cryoci.shim import hooked, paths
from cryoci.shim.engines import processes

HOOKS = Path(__file__).parents[2] / "hooks"
SPEC = {
    "process": {"env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"]},
    "linux": {"devices": [{"path": "/dev/nvidia1", "type": "c"}, {"path": "/dev/fuse", "type": "c"}]},
    "annotations": {
        "cdi.k8s.io/gpu": "nvidia.com/gpu=1",
        "io.kubernetes.cri-o.ImageRef": "registry/x@sha256:" + "a" * 64,
        "secret": "s3cret",
    },
}


def run(stage: str, state: bytes | str, home: Path) -> subprocess.CompletedProcess[bytes]:
    data = state if isinstance(state, bytes) else state.encode()
    result = subprocess.run(
        [HOOKS / "hook.py", stage],
        input=data,
        capture_output=True,
        env={"CRYOCI_RUN": str(home)},
        timeout=20,
    )
    assert result.returncode == 0
    assert result.stdout == b""
    return result


def state(tmp_path: Path, spec: Any = SPEC) -> str:
    (tmp_path / "config.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return json.dumps(
        {"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 7, "bundle": str(tmp_path)}
    )


@pytest.mark.parametrize("stage", ["createRuntime", "prestart"])
def test_a_container_is_noted_and_forgotten(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    assert run(stage, state(tmp_path), tmp_path / "run").stderr == b""
    path = Path(hooked.path("c1") or "")
    assert path.stat().st_mode & 0o777 == 0o600
    value = json.loads(path.read_text())
    assert value["gpus"] == ["/dev/nvidia1"] and value["visible"] == ["NVIDIA_VISIBLE_DEVICES=all"]
    assert "s3cret" not in path.read_text()
    found = hooked.facts("c1")
    assert found["gpu.devices"] == "/dev/nvidia1" and found["gpu.cdi"] == "nvidia.com/gpu=1"
    assert found["image.digest"] == "sha256:" + "a" * 64
    assert families.build(found)["io.cryoci.gpu.cdi"] == "nvidia.com/gpu=1"
    run(stage, state(tmp_path), tmp_path / "run")  # runc again on restore: the same note
    run("poststop", state(tmp_path), tmp_path / "run")
    assert not path.exists() and hooked.facts("c1") == {}
    run("poststop", state(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "given"),
    [
        ("createRuntime", b""),
        ("createRuntime", b"[]"),
        ("createRuntime", b'{"id": "../../x", "bundle": "/"}'),
        ("createRuntime", b'{"id": "c1", "bundle": "/nowhere"}'),
        ("poststop", b"\xff"),
        ("startContainer", b"{}"),
    ],
)
def test_what_goes_wrong_is_said_and_fails_nothing(stage: str, given: bytes, tmp_path: Path) -> None:
    said = run(stage, given, tmp_path).stderr
    assert said.startswith(b"cryoci-hook: ")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_bundle_and_a_full_disk_fail_nothing(tmp_path: Path) -> None:
    assert b"cryoci-hook: " in run("createRuntime", state(tmp_path, "{"), tmp_path / "run").stderr
    (tmp_path / "file").touch()
    assert b"cryoci-hook: " in run("createRuntime", state(tmp_path), tmp_path / "file").stderr


def test_it_does_not_wait_for_ever(tmp_path: Path) -> None:
    """A runtime that never closes the pipe."""
    start = time.monotonic()
    with subprocess.Popen(
        [HOOKS / "hook.py", "createRuntime"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.wait(20) == 0
        assert child.stderr is not None and b"out of time" in child.stderr.read()
    assert 1.5 < time.monotonic() - start < 15


def test_the_notes_of_others_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path))
    (tmp_path / "hooked").mkdir()
    for text in ("", "[]", '{"image": 3}', '{"gpus": 3}'):
        (tmp_path / "hooked/c1.json").write_text(text)
        assert hooked.facts("c1") == {}
    assert hooked.facts("../c1") == {}


def test_poststop_clears_up_after_checkpoints_of_a_container_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    left = ("held.json", "memory.json", "gpu.json", "criu.conf", "dump.log", "checkpoint.lock")
    foreign, ours, busy = (
        Path(paths.container_directory(root, "c1")) for root in (None, "/run/a", "/run/b")
    )
    for directory in (foreign, ours, busy):
        directory.mkdir(parents=True)
        for name in left:
            (directory / name).touch()
    (ours / "runtime").touch()
    (foreign / "checkpoint.lock").unlink()
    with processes.lock(busy / "checkpoint.lock") as locked:
        assert locked
        run("poststop", state(tmp_path), tmp_path / "run")
        assert sorted(os.listdir(busy)) == sorted(left)
    assert os.listdir(foreign) == ["dump.log"]  # the reason of a failure outlives the container
    assert sorted(os.listdir(ours)) == sorted((*left, "runtime"))


DEVICE = {"path": "/dev/fake0", "hostPath": "/dev/zero"}
CDI = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.example/gpu",
    "devices": [{"name": "0", "containerEdits": {"deviceNodes": [DEVICE], "env": ["FAKE=1"]}}],
}


def precreate(spec: bytes, home: Path) -> tuple[int, bytes, bytes]:
    """The hook at podman's own stage, with one device in a CDI directory of its own."""
    (home / "cdi").mkdir(exist_ok=True)
    (home / "cdi/x.json").write_text(json.dumps(CDI))
    (home / "config.toml").write_text(f'[devices]\ncdi-directories = ["{home}/cdi"]\n')
    result = subprocess.run(
        [HOOKS / "hook.py", "precreate"], input=spec, capture_output=True, timeout=20,
        env={"CRYOCI_RUN": str(home / "run"), "CRYOCI_CONFIG": str(home / "config.toml")},
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b'{"annotations": {"a": "b"}}', b'{"process": {"env": ["A=b"]}}']
)
def test_precreate_leaves_alone_what_asks_for_nothing(raw: bytes, tmp_path: Path) -> None:
    assert precreate(raw, tmp_path) == (0, raw, b"")


@pytest.mark.parametrize("key", ["io.cryoci.gpus", "cdi.k8s.io/x"])
def test_precreate_puts_the_device_in_once(key: str, tmp_path: Path) -> None:
    spec = {"annotations": {key: "vendor.example/gpu=0"}, "process": {"env": ["A=b"]}, "linux": {}}
    status, out, said = precreate(json.dumps(spec).encode(), tmp_path)
    done = json.loads(out)
    assert (status, said) == (0, b"")
    assert [d["path"] for d in done["linux"]["devices"]] == ["/dev/fake0"]
    assert done["process"]["env"] == ["A=b", "FAKE=1"]
    assert precreate(out, tmp_path) == (0, out, b"")  # as cryoci-runtime below it, or podman --device


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"annotations": {"io.cryoci.gpus": "vendor.example/gpu=7"}}, b"no CDI device vendor.example/gpu=7"),
        ({"annotations": {"io.cryoci.gpus": "vendor.example/gpu=0"}, "linux": 3}, b"cannot be put in"),
    ],
)
def test_precreate_fails_a_container_whose_device_it_cannot_give(
    spec: Any, words: bytes, tmp_path: Path
) -> None:
    status, out, said = precreate(json.dumps(spec).encode(), tmp_path)
    assert (status, out) == (1, b"") and words in said
    assert (tmp_path / "run/hook.log").read_bytes() == said  # podman shows none of it, but this path


def test_hooks_d() -> None:
    """hooks.d(5), 1.0.0: one file a stage, each with the stage as its argument."""
    files = sorted((HOOKS / "hooks.d").iterdir())
    stages = []
    for file in files:
        value = json.loads(file.read_text())
        assert set(value) == {"version", "hook", "when", "stages"} and value["version"] == "1.0.0"
        assert value["when"] == {"always": True}
        assert value["hook"]["args"] == ["cryoci-hook", *value["stages"]]
        assert file.name == f"cryoci-{value['stages'][0]}.json"
        stages += value["stages"]
    assert stages == ["createRuntime", "poststop"]
    own = json.loads((HOOKS / "podman.d/cryoci-precreate.json").read_text())
    assert own["stages"] == ["precreate"] and own["hook"]["args"][1:] == ["precreate"]
    assert "/run/cryoci/hook.log" in own["hook"]["args"][0]
    (key,) = own["when"]["annotations"]
    assert all(re.search(key, name) for name in ("io.cryoci.gpus", "cdi.k8s.io/x"))
    assert not re.search(key, "io.cryoci.gpus-of-another")
    assert os.access(HOOKS / "hook.py", os.X_OK)
