# SPDX-License-Identifier: Apache-2.0
"""Engines as a kubelet sees them: configured by `cryoci install`, asked through the CRI, by crictl.

Debian has neither crictl nor CRI-O. CRYOCI_TEST_CRIO names a directory with crictl, and for CRI-O itself with crio
and pinns; what it does not hold is skipped, and says so.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import tree, workload
from tests.nodes.node import Node, Result

GIVEN = "CRYOCI_TEST_CRIO"
PAUSE = "localhost/pause:1"
_NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge", "bridge": "cni0", "isGateway": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.9.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]},
        },
    ],
}  # fmt: skip
_CONTAINERD = """\
version = {version}
[plugins.'{images}']
  {pause} = "{image}"
[plugins.'{runtime}'.cni]
  bin_dir{s} = {bin}
  conf_dir = "/etc/cni/net.d"
[plugins.'{runtime}'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'{runtime}'.containerd.runtimes.crun]
  runtime_type = "io.containerd.runc.v2"
[plugins.'{runtime}'.containerd.runtimes.crun.options]
  BinaryName = "/usr/bin/crun"
"""
_CRIO = f"""\
[crio.image]
pause_image = "{PAUSE}"
pause_command = ""
[crio.network]
plugin_dirs = ["/usr/lib/cni"]
[crio.runtime]
cgroup_manager = "cgroupfs"
default_runtime = "runc"
pinns_path = "/usr/local/bin/pinns"
[crio.runtime.runtimes.runc]
runtime_path = "/usr/sbin/runc"
monitor_path = "/usr/bin/conmon"
monitor_cgroup = "pod"
[crio.runtime.runtimes.crun]
runtime_path = "/usr/bin/crun"
monitor_path = "/usr/bin/conmon"
monitor_cgroup = "pod"
"""


@dataclass(frozen=True)
class Kind:
    """An engine: its daemon and socket, files of the operator, and the root under which runtimes keep state."""

    name: str
    daemon: str
    socket: str
    files: Mapping[str, str]
    path: str = ""  # before the PATH of a node

    @property
    def engine(self) -> str:
        return self.daemon

    def root(self, below: str) -> str:
        return f"/run/{below}" if self.daemon == "crio" else "/run/containerd/runc/k8s.io"


def _containerd(version: int) -> dict[str, str]:
    old = version == 2
    text = _CONTAINERD.format(
        version=version,
        images="io.containerd.grpc.v1.cri" if old else "io.containerd.cri.v1.images'.'pinned_images",
        runtime="io.containerd.grpc.v1.cri" if old else "io.containerd.cri.v1.runtime",
        pause="sandbox_image" if old else "sandbox",
        image=PAUSE,
        s="" if old else "s",
        bin='"/usr/lib/cni"' if old else '["/usr/lib/cni"]',
    )
    return {"/etc/containerd/config.toml": text}


_SOCKET = "/run/containerd/containerd.sock"
KINDS = {
    "containerd-1": Kind("containerd-1", "containerd", _SOCKET, _containerd(2)),
    "containerd-2": Kind(
        "containerd-2", "containerd", _SOCKET, _containerd(3), f"{tree.NEW_CONTAINERD}/usr/bin"
    ),
    "crio": Kind("crio", "crio", "/var/run/crio/crio.sock", {"/etc/crio/crio.conf.d/10-node.conf": _CRIO}),
}


def given(*names: str) -> list[Path]:
    """Those programs of CRYOCI_TEST_CRIO; skips without."""
    place = os.environ.get(GIVEN)
    if not place:
        pytest.skip(f"Debian has no {names[0]}: {GIVEN}=DIR names a directory with {', '.join(names)}")
    paths = [Path(place, name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        pytest.skip(f"{GIVEN}={place} has no {', '.join(missing)}")
    return paths


def equip(node: Node) -> None:
    """crictl, a pod network, the counter and an image for sandboxes (the counter's, asleep)."""
    for path in given("crictl"):
        node.write(f"/usr/local/bin/{path.name}", path.read_bytes(), mode=0o755)
    workload.load(node)
    node.write("/etc/cni/net.d/10-pods.conflist", json.dumps(_NETWORK))
    node.sh(
        'c=$(buildah from "$1") && buildah config --entrypoint [] --cmd "sleep infinity" $c'
        ' && buildah commit -q $c "$2" && buildah push -q "$2" "oci-archive:/srv/pause.tar:$2"',
        workload.IMAGE,
        PAUSE,
    )


class Engine:
    """A running engine of one kind on `node`, with a handler `cryoci` by `cryoci install`."""

    def __init__(self, node: Node, kind: Kind) -> None:
        self.node = node
        self.kind = kind
        self.env: dict[str, str] = {}
        if kind.path:
            self.env["PATH"] = f"{kind.path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

    def start(self) -> str:
        """Configure and start it; returns what `cryoci install` said."""
        if self.kind.daemon == "crio":
            for program in given("crio", "pinns"):
                self.node.write(f"/usr/local/bin/{program.name}", program.read_bytes(), mode=0o755)
        for path, text in self.kind.files.items():
            self.node.write(path, text)
        self.node.write("/etc/crictl.yaml", f"runtime-endpoint: unix://{self.kind.socket}\n")
        said = self.node.run(
            ["cryoci", "install", "--engine", self.kind.engine], env=self.env
        ).stdout.decode()
        script = f"setsid {self.kind.daemon} >/var/log/{self.kind.name}.log 2>&1 </dev/null &"
        self.node.run(["/bin/sh", "-c", script], env=self.env)
        deadline = time.monotonic() + 60
        while (asked := self.crictl("info", check=False)).returncode != 0:
            assert time.monotonic() < deadline, asked.stderr.decode() + self.log
            time.sleep(0.3)
        if self.kind.daemon == "containerd":
            for archive in (workload.ARCHIVE, "/srv/pause.tar"):
                self.node.run(["ctr", "-n", "k8s.io", "image", "import", archive], env=self.env, timeout=120)
        return said

    def stop(self) -> None:
        """End pods, daemon and configuration."""
        self.crictl("rmp", "--all", "--force", check=False)
        self.node.sh(f"pkill -x {self.kind.daemon} || true")
        self.node.run(["cryoci", "uninstall"])
        self.node.run(["rm", "-rf", *self.kind.files, "/var/lib/containerd", "/run/containerd"], check=False)

    @property
    def log(self) -> str:
        return self.node.sh(f"tail -n 40 /var/log/{self.kind.name}.log | cut -c1-600")

    def crictl(self, *words: str, check: bool = True) -> Result:
        return self.node.run(["crictl", "--timeout=60s", *words], env=self.env, check=check, timeout=120)

    def say(self, *words: str) -> str:
        return self.crictl(*words).stdout.decode().strip()

    def pod(
        self, name: str, handler: str = "cryoci", annotations: Mapping[str, str] | None = None
    ) -> tuple[str, str]:
        """A sandbox; returns its id and the path of its configuration."""
        path = f"/srv/{name}.pod.json"
        config = {
            "metadata": {"name": name, "namespace": "team", "uid": name, "attempt": 0},
            "hostname": name,
            "log_directory": f"/var/log/pods/{name}",
            "annotations": dict(annotations or {}),
            "linux": {"cgroup_parent": f"/kubepods/{name}"},
        }
        self.node.write(path, json.dumps(config))
        return self.say("runp", f"--runtime={handler}", path), path

    def container(
        self,
        pod: tuple[str, str],
        name: str = "app",
        *,
        image: str = workload.IMAGE,
        command: tuple[str, ...] = (*workload.COMMAND, "--memory-mib=4"),
        annotations: Mapping[str, str] | None = None,
        own_processes: bool = False,
    ) -> str:
        """Create a container in a pod, which shares its processes unless `own_processes`; returns its id."""
        path = pod[1].replace(".pod.json", f".{name}.json")
        config = {
            "metadata": {"name": name, "attempt": 0},
            "image": {"image": image},
            "command": command,
            "log_path": f"{name}.log",
            "annotations": dict(annotations or {}),
            "linux": {
                "resources": {"memory_limit_in_bytes": 200 << 20},
                "security_context": {
                    "namespace_options": {"pid": int(own_processes)}
                },  # NamespaceMode: POD, CONTAINER
            },
        }
        self.node.write(path, json.dumps(config))
        return self.say("create", "--no-pull", pod[0], path, pod[1])

    def started(self, pod: tuple[str, str], name: str = "app", **more: Any) -> str:
        one = self.container(pod, name, **more)
        self.crictl("start", one)
        return one

    def end(self, pod: tuple[str, str], *containers: str) -> None:
        """Stop and remove containers, then their pod.

        CRI-O's StopPodSandbox may not come back in these machines, over bare runc as well; `stop` ends what is left.
        """
        for one in containers:
            self.crictl("stop", "--timeout=2", one)
            self.crictl("rm", one)
        asked = self.node.run(
            ["crictl", "--timeout=10s", "rmp", "--force", pod[0]], env=self.env, check=False
        )
        assert asked.returncode == 0 or self.kind.daemon == "crio", asked.stderr.decode()

    def pid(self, container: str) -> int:
        return int(json.loads(self.say("inspect", container))["info"]["pid"])

    def wait(self, container: str, count: int) -> dict[str, Any]:
        """The counter's own words once it has counted so far."""
        return workload.wait(self.node, count, pid=self.pid(container), timeout=60)
