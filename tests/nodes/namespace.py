# SPDX-License-Identifier: Apache-2.0
"""A namespace node: a machine made of namespaces, a cgroup2 subtree and an overlay, on the host's kernel.

Everything it owns hangs on its pid 1 and on its cgroup: killing them leaves no process, mount, network
namespace or veth behind. A supervisor (init.py) does that, also when the harness dies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cryoci.command import which
from tests.nodes import defaults, tree, workload
from tests.nodes.network import Switch
from tests.nodes.node import ENVIRONMENT, Node, NodeError, Result, Words
from tests.nodes.supervisor import Supervisor

# The shell puts itself into the node's cgroup (nsenter does not), then becomes nsenter. The command gets
# SIGKILL when nsenter dies, so that killing the Popen kills it.
_ENTER = 'echo 0 > "$1" && shift && exec "$@"'


class NamespaceNode(Node):
    """A namespace node; made by `Cluster.start`.

    `cgroup` is its cgroup2 directory on the host, `pid` its pid 1 there, 0 when it does not run.
    """

    def __init__(self, cgroup: Path, switch: Switch, name: str, index: int) -> None:
        self.name = name
        self.address = defaults.address(index)
        self.cgroup = cgroup
        self._switch = switch
        self._port = f"port{index}"
        self.pid = 0
        self._supervisor: Supervisor | None = None
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        files: Mapping[str, str],
        *,
        disk: Path | None,
        scratch_mib: int,
        run_mib: int,
        tmp_mib: int,
        shown: Mapping[str, Path],
    ) -> None:
        """Start it with `files` (path to text) on its overlay; sizes are of its tmpfs mounts, in MiB.

        `shown` maps paths in it to directories of the host.
        """
        scratch = tree.CACHE / "scratch"  # only a mount point; every node has its own mount there
        scratch.mkdir(parents=True, exist_ok=True)
        if disk is not None:
            disk.mkdir(parents=True)
        self._supervisor = Supervisor({
            "name": self.name, "cgroup": str(self.cgroup), "lower": [str(p) for p in workload.lower()],
            "scratch": str(scratch), "disk": None if disk is None else str(disk), "scratch_mib": scratch_mib,
            "run_mib": run_mib, "tmp_mib": tmp_mib, "files": dict(files),
            "shown": {path: str(directory) for path, directory in shown.items()},
        })  # fmt: skip
        self.pid = self._supervisor.pid
        self._switch.plug(self._port, self.pid, self.address)

    def popen(
        self,
        argv: Words,
        *,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command in the node; stdin is the node's own /dev/null unless given.

        A file of the host as stdio makes CRIU refuse a container that inherits it ("Can't lookup mount"):
        give a pipe, or a file opened below `path()`. Killing the process kills the command.
        """
        if not self.pid:
            raise NodeError(f"node {self.name} is not running")
        words = [os.fspath(a) for a in argv]
        enter = [
            which("nsenter", package="util-linux"),
            "-t",
            str(self.pid),
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            "-C",
            "--",
        ]
        leash = ["setpriv", "--pdeathsig", "KILL", *words]
        environment = {**ENVIRONMENT, **(env or {})}
        procs = str(self.cgroup / "init" / "cgroup.procs")
        with contextlib.ExitStack() as stack:
            if stdin is None:
                stdin = stack.enter_context(self.path("/dev/null").open("rb"))
            process = subprocess.Popen(
                ["/bin/sh", "-c", _ENTER, "sh", procs, *enter, *leash],
                stdin=stdin, stdout=stdout, stderr=stderr, env=environment, cwd="/", start_new_session=True,
            )  # fmt: skip
        self._running = [p for p in self._running if p.poll() is None]
        self._running.append(process)
        return process

    def path(self, path: str) -> Path:
        """The file seen from the host, tmpfs mounts too; absolute links below it resolve on the host."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def cut(self) -> None:
        self._switch.ip(f"link set {self._port} down")

    def join(self) -> None:
        self._switch.ip(f"link set {self._port} up")

    def kill(self) -> None:
        """SIGKILL to its pid 1 and so to everything in it; its mounts and network go with it."""
        if self._supervisor is None:
            return
        self._supervisor.stop()
        for process in self._running:
            process.kill()
            process.wait()
        self._supervisor, self._running, self.pid = None, [], 0

    @property
    def alive(self) -> bool:
        return self._supervisor is not None and self._supervisor.alive

    def _execute(
        self, argv: list[str], input: bytes | None, timeout: float | None, env: Mapping[str, str]
    ) -> Result:
        process = self.popen(argv, stdin=None if input is None else subprocess.PIPE, env=env)
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        return Result(argv, process.returncode, out, err)

    def _by_hand(self) -> str:
        return f"nsenter -t {self.pid} -a"
