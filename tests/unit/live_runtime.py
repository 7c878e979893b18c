# SPDX-License-Identifier: Apache-2.0
"""A fake OCI runtime that keeps a container's state, for what calls it many times.

The state is a file, the container's process a real one. `wish` makes a verb fail or do something first.
"""

from __future__ import annotations

import json
import os
import posix
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cryoci.shim import paths
from cryoci.shim.engines.container import Container

_SCRIPT = """#!/usr/bin/python3 -IS
import json, os, signal, sys
base = {base!r}
def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]
if sys.argv[1:] == ["--version"]:
    print("runc version 1.1.15")
    sys.exit(0)
verb = next(word for word in sys.argv[1:] if word in (
    "state", "pause", "resume", "checkpoint", "restore", "kill", "delete", "exec"))
with open(base + "/calls", "a") as f:
    f.write(json.dumps(sys.argv[1:]) + "\\n")
state = json.load(open(base + "/state"))
wish = json.load(open(base + "/wish")).get(verb, {{}})
if "log" in wish:
    name = "dump.log" if verb == "checkpoint" else "restore.log"
    open(value("--work-path") + "/" + name, "w").write(wish["log"])
if "say" in wish:
    print(wish["say"], file=sys.stderr)
if "status" in wish:
    sys.exit(wish["status"])
if verb == "state":
    if state["status"] == "gone":
        print("container does not exist", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(state))
elif verb == "pause":
    state["status"] = "paused"
elif verb == "resume":
    if state["status"] != "stopped":
        state["status"] = "running" if os.path.exists("/proc/%d" % state["pid"]) else "stopped"
elif verb == "checkpoint":
    if "empty" not in wish:
        open(value("--image-path") + "/inventory.img", "w").close()
    if "--leave-running" not in sys.argv:
        state["status"] = "stopped"
elif verb == "restore":
    state["status"] = "running"
elif verb == "kill":
    if sys.argv[-1] in ("KILL", "SIGKILL", "9"):
        state["status"] = "stopped"
elif verb == "exec":
    if "sleep" in wish:
        import time
        open(value("--pid-file"), "w").write(str(os.getpid()))
        time.sleep(wish["sleep"])
elif verb == "delete":
    state["status"] = "gone"
json.dump(state, open(base + "/state", "w"))
"""


class LiveRuntime:
    """One container of a fake runtime in `directory`; `container` is what the engine side sees of it."""

    def __init__(self, directory: Path, pid: int) -> None:
        self.directory = directory
        self.program = directory / "bin" / "runc"
        self.program.parent.mkdir()
        self.program.write_text(_SCRIPT.format(base=str(directory)))
        self.program.chmod(0o755)
        criu = self.program.with_name("criu")
        criu.write_text("#!/bin/sh\necho Version: 4.2.1\n")
        criu.chmod(0o755)
        self.bundle = directory / "bundle"
        (self.bundle / "rootfs/data").mkdir(parents=True)
        (self.bundle / "rootfs/data/file").write_text("file")
        self.spec: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "process": {"args": ["sh"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc"}],
            "linux": {"namespaces": [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount")]},
        }
        (self.bundle / "config.json").write_text(json.dumps(self.spec))
        self.state = {"id": "web", "pid": pid, "status": "running", "bundle": str(self.bundle)}
        self.set_status("running")
        self.wish()

    def set_status(self, status: str) -> None:
        """What the runtime says of the container from now on."""
        self.state["status"] = status
        (self.directory / "state").write_text(json.dumps(self.state))

    @property
    def status(self) -> str:
        """What the runtime would say now."""
        return str(json.loads((self.directory / "state").read_text())["status"])

    def wish(self, **verbs: dict[str, Any]) -> None:
        """How verbs behave: status (exit), say (stderr), log (CRIU's), empty (no image)."""
        (self.directory / "wish").write_text(json.dumps(verbs))

    @property
    def verbs(self) -> list[str]:
        """The verbs that changed something, in order."""
        try:
            lines = (self.directory / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        acts = {"pause", "resume", "checkpoint", "restore", "kill", "delete", "exec"}
        return [word for line in lines for word in json.loads(line) if word in acts]

    def words(self, verb: str) -> list[str]:
        """The words of the last call of `verb`."""
        lines = (self.directory / "calls").read_text().splitlines()
        calls: list[list[str]] = [json.loads(line) for line in lines]
        return [call for call in calls if verb in call][-1]

    def container(self, **changes: Any) -> Container:
        """The container as its engine knows it."""
        values: dict[str, Any] = {
            "engine": "runc",
            "id": "web",
            "name": "web",
            "runtime": str(self.program),
            "root": None,
            "bundle": self.bundle,
            "rootfs": self.bundle / "rootfs",
            "overlay": None,
            "spec": self.spec,
            "dumps": {"config.dump": {"id": "web"}},
        }
        return Container(**{**values, **changes})


@contextmanager
def stored(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    """`running` for the command line: with scratch, store and bundles of its own, and a podman that knows nothing."""
    with running(directory, monkeypatch) as made:
        monkeypatch.setenv("TMPDIR", str(directory / "scratch"))
        monkeypatch.setenv("CRYOCI_STORE", str(directory / "store"))
        monkeypatch.setattr(
            paths, "bundle_directory", lambda root, container: str(directory / "bundles" / container)
        )
        podman = made.program.with_name("podman")
        podman.write_text("#!/bin/sh\necho 'Error: no such container' >&2; exit 125\n")
        podman.chmod(0o755)
        yield made


@contextmanager
def running(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    """A fake runtime whose container has a real process, with its own PATH and run directory."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        made = LiveRuntime(directory, process.pid)
        for name, value in {
            "PATH": f"{made.program.parent}:{os.environ.get('PATH', os.defpath)}",
            "CRYOCI_RUN": str(directory / "run"),
            "CRYOCI_CONFIG": str(directory / "no-config.toml"),
        }.items():
            monkeypatch.setenv(name, value)
            monkeypatch.setitem(posix.environ, name.encode(), value.encode())
        yield made
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
