# SPDX-License-Identifier: Apache-2.0
"""The container under test: started, asked and ended in the way of its engine.

subject = Subject(node, KINDS["podman+runc"], "web", "registry:5000/counter:1")
subject.start()
subject.ask()["count"]
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any

from tests.nodes import workload
from tests.nodes.node import Node

CONFIG = "/etc/cryoci/config.toml"
TMPFS = "/scratch"  # a tmpfs of every subject
UNUSED = "/usr/bin/tac"  # a file of the image that the counter never opens
SMALL = ("--memory-mib=4",)


@dataclass(frozen=True)
class Kind:
    """Who runs the container: `engine` podman or none (bare), its runtime's name, and what is below that."""

    engine: str
    runtime: str
    below: str

    @property
    def podman(self) -> bool:
        return self.engine == "podman"


KINDS = {
    "podman+cryoci-runtime": Kind("podman", "cryoci-runtime", "runc"),
    "podman+runc": Kind("podman", "runc", "runc"),
    "podman+crun": Kind("podman", "crun", "crun"),
    "runc": Kind("bare", "runc", "runc"),
    "crun": Kind("bare", "crun", "crun"),
    "cryoci-runtime": Kind("bare", "cryoci-runtime", "runc"),
}


@dataclass
class Subject:
    """A counter on `node` called `name`; `image` is where podman has it from."""

    node: Node
    kind: Kind
    name: str
    image: str = ""
    restored: bool = False

    def on(self, node: Node, name: str | None = None) -> Subject:
        """The same container elsewhere, or under another name."""
        return dataclasses.replace(self, node=node, name=name or self.name)

    def start(self, *args: str, options: tuple[str, ...] = (), network: bool = True) -> dict[str, Any]:
        """Start it and wait for its first count; `args` go to the counter, `options` to podman run.

        Without `network` it shares the node's.
        """
        args = (*SMALL, *args)
        if self.kind.podman:
            self.node.run([
                "podman", f"--runtime={self.kind.runtime}", "run", "--detach", "--quiet", f"--name={self.name}",
                f"--tmpfs={TMPFS}", *([] if network else ["--network=host"]), *options, self.image,
                *workload.COMMAND, *args,
            ])  # fmt: skip
        else:
            config = workload.bundle(self.node, self.bundle, args=args, network=network)
            mount = {"destination": TMPFS, "type": "tmpfs", "source": "tmpfs", "options": ["size=8m"]}
            config["mounts"].append(mount)
            self.node.write(f"{self.bundle}/config.json", json.dumps(config))
            argv = [self.kind.runtime, "run", "--detach", "--bundle", self.bundle, self.name]
            workload.detach(self.node, argv, self.log)
        return self.wait(2)

    @property
    def bundle(self) -> str:
        return f"/srv/{self.name}"

    @property
    def log(self) -> str:
        return f"/srv/{self.name}.log"

    @property
    def id(self) -> str:
        return str(self._inspect()["Id"]) if self.kind.podman else self.name

    @property
    def pid(self) -> int:
        """Its first process, as the node counts."""
        if self.kind.podman:
            return int(self._inspect()["State"]["Pid"])
        return int(json.loads(self.node.run([self.kind.runtime, "state", self.name]).stdout)["pid"])

    @property
    def status(self) -> str:
        """As the engine says: running, paused, exited (podman), stopped (bare), or gone."""
        if self.kind.podman:
            argv = ["podman", "container", "inspect", "--format={{.State.Status}}", self.name]
            asked = self.node.run(argv, check=False)
            return asked.stdout.decode().strip() if asked.returncode == 0 else "gone"
        asked = self.node.run([self.kind.runtime, "state", self.name], check=False)
        return str(json.loads(asked.stdout)["status"]) if asked.returncode == 0 else "gone"

    def ask(self, path: str = "/") -> dict[str, Any]:
        """Its own answer, from inside of its network."""
        return workload.ask(self.node, path, pid=self.pid)

    def wait(self, count: int) -> dict[str, Any]:
        """Its state once it has counted to `count`."""
        end = time.monotonic() + 20
        while not (pid := self.pid) and time.monotonic() < end:
            time.sleep(0.05)
        return workload.wait(self.node, count, pid=pid)

    @property
    def cgroups(self) -> set[str]:
        """The cgroups of its processes: one, unless some have strayed."""
        pid = self.pid
        children = self.node.sh(f"cat /proc/{pid}/task/*/children").split()
        assert children
        return {self.node.read(f"/proc/{p}/cgroup").decode().rpartition("0::")[2] for p in [pid, *children]}

    def inside(self, *argv: str) -> str:
        """Run a program of the container's image in its mount namespace."""
        return self.node.run(["nsenter", "--target", str(self.pid), "--mount", "--", *argv]).stdout.decode()

    def has(self, path: str) -> bool:
        """Whether the file is there, in the container."""
        pid = str(self.pid)
        return self.node.run(["nsenter", "-t", pid, "-m", "test", "-e", path], check=False).returncode == 0

    def checkpoint(self, target: str, *words: str) -> dict[str, Any]:
        """`cryoci checkpoint` of it; returns what --json says."""
        argv = ["cryoci", "checkpoint", self.name, "--output", target, "--json", *words]
        report: dict[str, Any] = json.loads(self.node.run(argv, timeout=180).stdout)
        return report

    def restore(self, reference: str, *words: str) -> None:
        """`cryoci restore --detach` of it under its name."""
        argv = ["cryoci", "restore", reference, "--detach", *words]
        if self.kind.podman:
            self.node.run(argv, timeout=120)
        else:
            workload.detach(self.node, argv, self.log)
        self.restored = True

    def remove(self) -> None:
        """End it and leave nothing."""
        if self.kind.podman:
            self.node.run(["podman", "rm", "--force", "--time=0", "--volumes", self.name])
        else:
            # what cryoci restored is cryoci-runtime's, and so is the bundle
            runtime = "cryoci-runtime" if self.restored else self.kind.runtime
            self.node.run([runtime, "delete", "--force", self.name], check=False)
            self.node.run(["rm", "-rf", self.bundle, self.log])

    def _inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.node.run(["podman", "container", "inspect", self.name]).stdout
        )[0]
        return found


def runs_on(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Assert that `after` is a later moment of the very processes that said `before`."""
    assert after["boot"] == before["boot"]
    assert after["memory_sha256"] == before["memory_sha256"]
    assert (after["pid"], after["child_pid"]) == (before["pid"], before["child_pid"])
    assert before["count"] < after["count"] < before["count"] + 2000
    assert after["child"] > before["child"]
    file = after["open_file"]
    assert file["path"] == before["open_file"]["path"]
    assert file["position"] == file["size"] > before["open_file"]["size"]


def failing(node: Node, argv: list[str], *, env: dict[str, str] | None = None, timeout: float = 120) -> str:
    """Run what must fail as cryoci fails: a nonzero status, one message, a hint; returns what it said."""
    result = node.run(argv, check=False, env=env, timeout=timeout)
    said = result.stderr.decode()
    assert result.returncode in (1, 2), f"status {result.returncode}: {said}{result.stdout.decode()}"
    assert "Traceback" not in said, said
    lines = said.splitlines()
    assert any(line.startswith("cryoci: ") for line in lines), said
    assert any(line.startswith("hint: ") for line in lines), said
    return said


_ECHO = """
import socket, sys, threading
server = socket.create_server(("", int(sys.argv[1])))
def serve(peer):
    while data := peer.recv(100):
        peer.sendall(data)
while True:
    threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()
"""


def echo(node: Node, port: int = 7777) -> int:
    """A TCP echo server on a node, started once; returns its port."""
    script = """
        ss -Hltn "sport = :$1" | grep -q . && exit
        setsid python3 -c "$2" "$1" >/dev/null 2>&1 </dev/null &
        while ! ss -Hltn "sport = :$1" | grep -q .; do sleep 0.05; done
    """
    node.run(["/bin/sh", "-c", script, "sh", str(port), _ECHO])
    return port


def connections(node: Node, port: int) -> list[str]:
    """Peer addresses of the established connections to a port of a node."""
    lines = node.sh(f"ss -Htn state established 'sport = :{port}'").splitlines()
    return sorted(line.split()[3] for line in lines)


def records(node: Node) -> str:
    """Files that cryoci-runtime keeps about containers, CRIU's logs left out (those outlive them)."""
    directory = "/run/cryoci/containers"
    script = f"[ ! -d {directory} ] || find {directory} -type f ! -name '*.log' | sort"
    return node.sh(script)


def leftovers(node: Node) -> dict[str, str]:
    """Everything on a node that a cryoci verb could leave behind; compared before and after a failure."""
    script = """
        echo "== podman"; podman ps --all --external --no-trunc --format '{{.ID}} {{.Names}}' | sort
        echo "== volumes"; podman volume ls --quiet | sort
        echo "== runc"; runc list --quiet; echo "== crun"; crun list --quiet
        echo "== mounts"; cut -d' ' -f5 /proc/self/mountinfo | grep -vx /run/netns | sort
        echo "== scratch"; find /var/lib/cryoci -mindepth 2 ! -path '*/bundles/default' ! -path '*/images/*' \
            2>/dev/null | sort
        echo "== tmp"; find /tmp /var/tmp -mindepth 1 -maxdepth 1 \\( -name '*cryoci*' -o -name 'restore.*' \
            -o -name 'checkpoint.*' -o -name 'pull.*' -o -name 'push.*' -o -name 'checkpoint_*' \\) | sort
        echo "== processes"; ps -eo args= | grep -E 'counter[.]py|[l]auncher[.]py|[c]onmon' | sort || true
        echo "== namespaces"; ls /run/netns 2>/dev/null | sort || true
    """
    found: dict[str, str] = {}
    section = ""
    for line in node.sh(script).splitlines():
        if line.startswith("== "):
            section = line[3:]
            found[section] = ""
        else:
            found[section] += line + "\n"
    found["records"] = records(node)
    return found
