# SPDX-License-Identifier: Apache-2.0
"""A fake OCI runtime on disk: it writes down how it was called and then does as it is told.

The word is in the environment: FAKE_STATUS (exit status), FAKE_STDOUT (hex bytes), FAKE_STDERR, FAKE_SIGNAL
(kill itself), FAKE_SLEEP (seconds; it exits 42 on SIGTERM), FAKE_LOG (CRIU log to write into --work-path),
FAKE_IMAGE (make inventory.img in --image-path).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).resolve().parents[2] / "cryoci" / "shim" / "launcher.py"

_SCRIPT = """#!/usr/bin/python3 -IS
import ctypes, json, os, signal, sys, time
def value(flag):
    return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else None
if sys.argv[1:] == ["--version"] and "FAKE_STDOUT" not in os.environ:
    print({version!r})
    sys.exit(0)
if sys.argv[1:2] == ["cpuinfo"]:  # what CRIU does beside a dump
    sys.exit(0)
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines() if ":" in line)
got = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(got))
fds = {{}}
for n in os.listdir("/proc/self/fd"):
    try:
        fds[n] = os.readlink("/proc/self/fd/" + n)
    except OSError:
        pass
raw = open("/proc/self/environ", "rb").read().split(b"\\0")[:-1]
call = dict(
    argv=sys.argv, program={path!r}, env=[os.fsdecode(w) for w in raw], cwd=os.getcwd(), fds=fds,
    pid=os.getpid(), ppid=os.getppid(), pdeathsig=got.value, blocked=int(status["SigBlk"], 16),
    pgid=os.getpgrp(), sid=os.getsid(0),
)
with open({calls!r}, "a") as f:
    f.write(json.dumps(call) + "\\n")
e = os.environ
if "FAKE_LOG" in e:
    name = "dump.log" if "checkpoint" in sys.argv else "restore.log"
    open(os.path.join(value("--work-path"), name), "w").write(e["FAKE_LOG"])
if "FAKE_IMAGE" in e:
    os.makedirs(value("--image-path"), exist_ok=True)
    open(value("--image-path") + "/inventory.img", "w").close()
os.write(1, bytes.fromhex(e.get("FAKE_STDOUT", "")))
os.write(2, e.get("FAKE_STDERR", "").encode())
if "FAKE_SIGNAL" in e:
    os.kill(os.getpid(), int(e["FAKE_SIGNAL"]))
if "FAKE_SLEEP" in e:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(42))
    os.write(1, b"ready\\n")
    time.sleep(float(e["FAKE_SLEEP"]))
sys.exit(int(e.get("FAKE_STATUS", "0")))
"""


class FakeNode:
    """A directory with a PATH, a run directory, a configuration and cryoci-runtime as an installed link."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.run_directory = directory / "run"
        self.config = directory / "etc" / "config.toml"
        self.calls_file = directory / "calls"
        self.bin.mkdir()
        self.config.parent.mkdir()
        self.launcher = self.bin / "cryoci-runtime"
        self.launcher.symlink_to(LAUNCHER)
        self.env = {
            "PATH": str(self.bin),
            "CRYOCI_RUN": str(self.run_directory),
            "CRYOCI_CONFIG": str(self.config),
        }

    def add(self, name: str, version: str = "", *, at: Path | None = None) -> Path:
        """Put a fake runtime on PATH (or at `at`); `version` is the first line of its --version."""
        path = at or self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        version = version or {"crun": "crun version 1.21", "criu": "Version: 4.2.1"}.get(
            name, f"{name} version 1.1.15+ds1"
        )
        path.write_text(_SCRIPT.format(version=version, path=str(path), calls=str(self.calls_file)))
        path.chmod(0o755)
        return path

    def call(
        self, *words: str, env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run cryoci-runtime once."""
        return subprocess.run(
            [str(self.launcher), *words],
            env={**self.env, **(env or {})},
            capture_output=True,
            timeout=30,
            **kwargs,
        )

    @property
    def calls(self) -> list[dict[str, Any]]:
        """How the fakes were called so far, oldest first; `--version` and `cpuinfo` questions do not count."""
        try:
            lines = self.calls_file.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    @property
    def words(self) -> list[str]:
        """The words of the last call, less the program."""
        return list(self.calls[-1]["argv"][1:])

    def bundle(self, name: str = "bundle", spec: Any = None) -> Path:
        """A bundle directory with a config.json."""
        path = self.directory / name
        path.mkdir(exist_ok=True)
        value = {"ociVersion": "1.0.2", "process": {"args": ["sh"]}, "root": {"path": "rootfs"}}
        (path / "config.json").write_text(json.dumps(value if spec is None else spec, indent=4))
        return path

    def record(self, container: str, key: str = "default") -> Path:
        """Directory of a container's record."""
        return self.run_directory / "containers" / key / container


def as_root() -> bool:
    """Checkpoint and restore refuse anybody else."""
    return os.geteuid() == 0
