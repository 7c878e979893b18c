# SPDX-License-Identifier: Apache-2.0
"""This machine as a node with a real GPU: containers of PyTorch on its own root file system, under runc or crun.

The root is an overlay over this machine's (or over GPU_BASE), so that its PyTorch and CUDA libraries are there;
changes stay in a tmpfs. The GPU's device nodes and the driver's folder are given as an engine with CDI would.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cryoci.shim.engines.container import LAUNCHER

HERE = Path(__file__).parent
# Without PyTorch this is a rehearsal on the fake driver (tests/node/test_gpu_suite.py), with programs to match.
STAND_IN = importlib.util.find_spec("torch") is None
BASE = Path("/srv/cryoci-gpu")
LOWER = os.environ.get("GPU_BASE", "/")  # what the containers' root is an overlay of
DRIVER_FOLDER = "/usr/local/nvidia"
CONFIG = """\
[runtime]
path = "{below}"
[criu]
network-lock = "skip"
libdir = "{libdir}"
[gpu]
engine = "{engine}"
lock-timeout = 30
"""
STARTUP = 120.0  # seconds until PyTorch's first step


class Node:
    """Environment and configuration for one runtime below cryoci-runtime.

    `more` ends its configuration. Two nodes with another `state` know nothing of each other: no store, no records, no
    checkpoints in common.
    """

    def __init__(
        self,
        below: str,
        state: str = "",
        engine: str = "driver",
        libdir: str = "/usr/lib/criu",
        more: str = "",
    ) -> None:
        self.below = below
        BASE.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(BASE):
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100g", "tmpfs", str(BASE)], check=True)
        config = BASE / f"config.{below}.{engine}{state}.toml"
        config.write_text(CONFIG.format(below=below, engine=engine, libdir=libdir) + more)
        self.environment = {
            **os.environ,
            "CRYOCI_CONFIG": str(config),
            "CRYOCI_STORE": str(BASE / f"store{state}"),
            "CRYOCI_RUN": str(BASE / f"run{state}"),
            "CRYOCI_LIB": str(BASE / f"lib{state}"),
            "TMPDIR": str(BASE),
        }

    def cryoci(
        self, *words: str, check: bool = True, prelude: str = "", timeout: float = 180
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the CLI; `prelude` is Python that runs in it first."""
        argv = [sys.executable, "-c", f"{prelude}\nfrom cryoci.cli.main import main; main()", *words]
        done = subprocess.run(argv, env=self.environment, capture_output=True, timeout=timeout)
        if check:
            assert done.returncode == 0, (
                f"cryoci {' '.join(words)}: {done.stderr.decode()}{done.stdout.decode()}"
            )
        return done

    def daemon(self, log: Path, *words: str) -> subprocess.Popen[bytes]:
        """`cryoci WORDS` in the background; `log` gets what it says."""
        argv = [sys.executable, "-u", "-m", "cryoci.cli.main", *words]
        with log.open("wb") as f:
            return subprocess.Popen(
                argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT
            )

    def runtime(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-IS", str(LAUNCHER), *words]
        return subprocess.run(argv, env=self.environment, capture_output=True, timeout=90)

    def refused(self, *words: str) -> str:
        """Run what must be refused; returns what it said."""
        done = self.cryoci(*words, check=False)
        said = done.stderr.decode()
        assert done.returncode in (1, 2) and "Traceback" not in said, said
        assert "hint: " in said, said
        return said


class Program:
    """A container `name` of a program of this folder, on the GPUs of this machine.

    `files` go to /app; `binds` are directories of this machine that it sees at the same place.
    """

    files: tuple[str, ...] = ()
    binds: tuple[Path, ...] = ()
    environment: tuple[str, ...] = ()
    annotations: dict[str, str] = {}
    driver_folder = True  # the driver's files where this machine has them

    def __init__(self, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        self.directory = BASE / name
        self._cat: subprocess.Popen[bytes] | None = None

    @property
    def bundle(self) -> str:
        return str(self.directory)

    def argv(self) -> list[str]:
        """The command line in the container."""
        raise NotImplementedError

    def run(self) -> None:
        """Start it; it is not ready then."""
        self.make_bundle()
        self._detached(
            [sys.executable, "-IS", str(LAUNCHER), "run", "--detach", "--bundle", self.bundle, self.name]
        )

    def make_bundle(self) -> None:
        """The bundle, and its root as an overlay."""
        if self.directory.exists():  # of a run that was killed
            self.remove()
        for name in ("upper/app", "work", "rootfs"):
            (self.directory / name).mkdir(parents=True)
        for name in self.files:
            shutil.copy(HERE / name, self.directory / "upper/app" / name)
        layers = f"lowerdir={LOWER},upperdir={self.directory}/upper,workdir={self.directory}/work"
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, str(self.directory / "rootfs")], check=True
        )
        subprocess.run([self.node.below, "spec"], cwd=self.directory, check=True)
        path = self.directory / "config.json"
        spec: dict[str, Any] = json.loads(path.read_text())
        process = spec["process"]
        keep = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG")
        process.update(
            terminal=False,
            args=self.argv(),
            env=[f"{k}={os.environ[k]}" for k in keep if k in os.environ] + list(self.environment),
        )
        process["rlimits"] = []
        if STAND_IN:  # what stands for GPU memory is locked memory
            for kind in process["capabilities"].values():
                kind.append("CAP_IPC_LOCK")
        spec["root"]["readonly"] = False
        linux = spec["linux"]
        linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "network"]
        linux["cgroupsPath"] = f"/{self.name}"
        spec["mounts"].append(
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=8g"]}
        )
        for mount in spec["mounts"]:
            if mount["destination"] == "/dev/shm":
                mount["options"] = ["nosuid", "noexec", "nodev", "mode=1777", "size=4g"]
        folders = [str(one) for one in self.binds]
        if self.driver_folder and os.path.ismount(DRIVER_FOLDER):
            folders.append(DRIVER_FOLDER)
        for one in folders:
            options = ["rbind", "ro", "rprivate"]
            spec["mounts"].append({"destination": one, "type": "bind", "source": one, "options": options})
        self.give_devices(spec)
        spec["annotations"] = {**spec.get("annotations", {}), **self.annotations}
        path.write_text(json.dumps(spec))

    def give_devices(self, spec: dict[str, Any]) -> None:
        """Put the nodes of all GPUs in, as an engine does."""
        devices: list[dict[str, Any]] = []
        rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
        for node in sorted(glob.glob("/dev/nvidia*")):
            seen = os.stat(node)
            if stat.S_ISCHR(seen.st_mode):
                numbers = {"type": "c", "major": os.major(seen.st_rdev), "minor": os.minor(seen.st_rdev)}
                devices.append({"path": node, **numbers, "fileMode": 0o666})
                rules.append({"allow": True, **numbers, "access": "rwm"})
        spec["linux"]["devices"] = devices
        spec["linux"]["resources"] = {"devices": rules}

    @property
    def state(self) -> dict[str, Any]:
        """The runtime's state; {} when it is gone."""
        asked = self.node.runtime("state", self.name)
        value: dict[str, Any] = json.loads(asked.stdout) if asked.returncode == 0 else {}
        return value

    @property
    def pid(self) -> int:
        return int(self.state["pid"])

    def bring_back(self, reference: str, *words: str) -> None:
        """`cryoci restore` of it into its bundle."""
        argv = [sys.executable, "-m", "cryoci.cli.main", "restore", reference, "--detach"]
        self._detached([*argv, "--bundle", self.bundle, *words])

    def _detached(self, argv: list[str]) -> None:
        log = (self.directory / "log").open("ab")
        ours, theirs = os.pipe()
        self._cat = subprocess.Popen(["cat"], stdin=ours, stdout=log, start_new_session=True)
        os.close(ours)
        done = subprocess.run(
            argv,
            env=self.node.environment,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            timeout=180,
        )
        os.close(theirs)
        log.close()
        assert done.returncode == 0, self.log()

    def log(self) -> str:
        """The end of what it and its runtime have printed."""
        time.sleep(0.2)
        return (self.directory / "log").read_text(errors="replace")[-3000:]

    def end(self) -> None:
        """Kill it; its bundle stays."""
        self.node.runtime("delete", "--force", self.name)

    def remove(self) -> None:
        """End it and leave nothing."""
        self.end()
        subprocess.run(["umount", "-l", str(self.directory / "rootfs")], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


class Trainer(Program):
    """A container `name` of the training loop."""

    files = ("standin_trainer.py" if STAND_IN else "trainer.py",)
    environment = ("CUBLAS_WORKSPACE_CONFIG=:4096:8",)

    def __init__(self, node: Node, name: str, *words: str, children: int = 0) -> None:
        super().__init__(node, name)
        self.children = children
        self.words = (*words, "--children", str(children))

    def argv(self) -> list[str]:
        return ["python3", "-u", f"/app/{self.files[0]}", "/tmp/status", *self.words]

    def start(self) -> Trainer:
        """Start it and wait for its first steps."""
        self.run()
        self.runs_on(0, seconds=STARTUP)
        return self

    def steps(self) -> list[dict[str, Any]]:
        """What each training process said last."""
        root = f"/proc/{self.pid}/root/tmp/status"
        return [
            json.loads(Path(p).read_text()) for p in (root, *(f"{root}.{n}" for n in range(self.children)))
        ]

    def runs_on(self, after: int | None = None, seconds: float = 60) -> list[dict[str, Any]]:
        """Wait for two more steps of every process, with all GPU memory intact."""
        start = [after] * (self.children + 1) if after is not None else [s["step"] for s in self.steps()]
        end = time.monotonic() + seconds
        while True:
            try:
                seen = self.steps()
            except (OSError, ValueError, KeyError):
                seen = []
            if seen and all(s["step"] >= n + 2 for s, n in zip(seen, start, strict=True)):
                assert all(s["good"] for s in seen), "GPU memory has changed"
                return seen
            assert self.state.get("status") != "stopped", self.log()
            assert time.monotonic() < end, f"it stands still at {seen}: {self.state}\n{self.log()}"
            time.sleep(0.05)

    def losses(self) -> list[str]:
        """Every step's line that the first process has written, in order."""
        return Path(f"/proc/{self.pid}/root/tmp/status.losses").read_text().splitlines()

    def restore(self, reference: str, *words: str) -> None:
        """`cryoci restore` of it into its bundle, and wait for its steps."""
        self.bring_back(reference, *words)
        self.runs_on()
