# SPDX-License-Identifier: Apache-2.0
"""CRI-O's exact way of calling: it is not packaged, so its command lines are replayed, by the real conmon.

Command lines and environment as in CRI-O 1.36: internal/oci/runtime_oci.go (CreateContainer, StartContainer,
CheckpointContainer, runtimeCmd); what follows from conmon's are conmon's own (src/runtime_args.c).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.node.subject import CONFIG, SMALL, records, runs_on
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

SHIM = "/usr/local/bin/cryoci-runtime"
# crio's own part: a process with CRI-O's environment for conmon and its two pipes; prints what conmon reports.
_CRIO = """
import json, os, subprocess, sys
sync, child_sync = os.pipe()
child_start, start = os.pipe()
env = {"_OCI_SYNCPIPE": "3", "_OCI_STARTPIPE": "4"}
if "--restore" in sys.argv:
    env["PATH"] = os.environ["PATH"]
def pipes():
    os.dup2(os.dup(child_sync), 13), os.dup2(os.dup(child_start), 14)
    os.dup2(13, 3), os.dup2(14, 4), os.close(13), os.close(14)
conmon = subprocess.Popen(["/usr/bin/conmon", *sys.argv[2:]], cwd=sys.argv[1], env=env, preexec_fn=pipes,
                          close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
os.close(child_sync), os.close(child_start)
os.write(start, b"\\0")
assert conmon.wait() == 0
print(os.fdopen(sync).readline())
"""


@dataclass
class Container:
    """A container as CRI-O lays it out: `bundle` on tmpfs, `directory` in storage, a sandbox's namespaces."""

    node: NamespaceNode
    id: str
    below: str
    noted: dict[str, str] = field(default_factory=dict)

    @property
    def bundle(self) -> str:
        return f"/srv/containers/{self.id}/bundle"

    @property
    def directory(self) -> str:
        return f"/srv/containers/{self.id}/userdata"

    def prepare(self) -> None:
        """The bundle, with a network namespace that a sandbox has made."""
        spec = workload.bundle(self.node, self.bundle, args=SMALL, network=True)
        self.node.sh(
            'mkdir -p "$1" /var/run/crio/exits /var/run/crio && ip netns add "$2" && ip -n "$2" link set lo up',
            self.directory,
            self.id,
        )
        for one in spec["linux"]["namespaces"]:
            if one["type"] == "network":
                one["path"] = f"/run/netns/{self.id}"
        spec["hostname"] = "pod"
        spec["linux"]["cgroupsPath"] = f"/kubepods/crio-{self.id}"
        spec["annotations"] = {
            "io.container.manager": "cri-o",
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.container.name": "app",
            "io.kubernetes.pod.namespace": "team",
            **self.noted,
        }
        self.node.write(f"{self.bundle}/config.json", json.dumps(spec))

    def monitor(self, *more: str) -> dict[str, Any]:
        """CreateContainer: conmon creates (or restores) it; returns its report."""
        words = [
            "-b", self.bundle, "-c", self.id, "--exit-dir", "/var/run/crio/exits",
            "-l", f"{self.directory}/log", "--log-level", "info", "-n", f"k8s_app_{self.id}",
            "-P", f"{self.bundle}/conmon-pidfile", "-p", f"{self.bundle}/pidfile",
            "--persist-dir", self.directory, "-r", SHIM, "--runtime-arg", f"--root={self.root}",
            "--socket-dir-path", "/var/run/crio", "-u", self.id, *more,
        ]  # fmt: skip
        said = self.node.run(["python3", "-c", _CRIO, self.bundle, *words]).stdout
        report: dict[str, Any] = json.loads(said)
        return report

    @property
    def root(self) -> str:
        return f"/run/{self.below}"

    def call(self, *words: str, check: bool = True) -> str:
        """runtimeCmd: crio calls the runtime itself."""
        env = {"CRI_O_EXTERNAL": "1"}
        return self.node.run([SHIM, "--root", self.root, *words], check=check, env=env).stdout.decode()

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("state", self.id))
        return found

    def end(self) -> str:
        """StopContainer and DeleteContainer; returns the exit status that conmon has noted."""
        self.call("kill", self.id, "15")
        exits = f"/var/run/crio/exits/{self.id}"
        self.node.sh('for i in $(seq 100); do [ -s "$1" ] && exit 0; sleep 0.05; done; exit 1', exits)
        status = self.node.read(exits).decode()
        self.call("delete", "--force", self.id)
        self.node.sh('rm "$1" && ip netns del "$2"', exits, self.id)
        return status


@pytest.fixture(scope="module")
def crio() -> Iterator[NamespaceNode]:
    with Cluster(tag="crio") as cluster:
        yield cluster.start("node")


def logged(node: NamespaceNode, path: str, text: str) -> None:
    """Wait for `text` in a log that conmon writes, which reads its pipe when it comes to it."""
    deadline = time.monotonic() + 20
    while text not in (said := node.read(path).decode()):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_checkpoint_and_restore(crio: NamespaceNode, below: str) -> None:
    node = crio
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    node.run([SHIM, "checkpoint", "--help"])  # CRRuntimeSupportsCheckpointRestore
    one = Container(node, f"first-{below}", below)
    one.prepare()
    pid = one.monitor()["pid"]
    assert one.state["status"] == "created" and one.state["pid"] == pid
    one.call("start", one.id)
    before = workload.wait(node, 3, pid=pid)
    images = f"{one.directory}/checkpoint"
    one.call("pause", one.id)
    one.call(
        "checkpoint",
        "--file-locks",
        "--image-path",
        images,
        "--work-path",
        one.directory,
        "--leave-running",
        one.id,
    )
    assert one.state["status"] == "paused"
    files = f"{one.directory}/files"  # exportCheckpoint's rootfs-diff.tar, in short
    node.run(["cp", "-a", f"{one.bundle}/rootfs/data", files])
    one.call("resume", one.id)
    runs_on(before, workload.wait(node, before["count"] + 3, pid=pid))
    names = node.sh(f"ls {one.directory} {images}").split()
    assert {"dump.log", "stats-dump", "descriptors.json", "inventory.img"} <= set(names)
    assert one.end() == "0"

    two = Container(node, f"second-{below}", below)
    two.prepare()
    node.sh('cp -a "$1"/. "$2"/rootfs/data && cp -a "$3" "$4"', files, two.bundle, images, two.directory)
    pid = two.monitor("--restore", f"{two.directory}/checkpoint")["pid"]
    assert two.state["status"] == "running" and two.state["pid"] == pid
    after = workload.wait(node, before["count"] + 3, pid=pid)
    assert (after["boot"], after["memory_sha256"]) == (before["boot"], before["memory_sha256"])
    logged(node, f"{two.directory}/log", f" count {after['count']}\n")
    assert two.end() == "0"
    assert "runtime" not in records(node)


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_annotated_create(crio: NamespaceNode, below: str) -> None:
    """CRI-O's create and start know nothing of it; its monitor's environment has not even a PATH."""
    node = crio
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    one = Container(node, f"origin-{below}", below)
    one.prepare()
    pid = one.monitor()["pid"]
    one.call("start", one.id)
    before = workload.wait(node, 3, pid=pid)
    archive = f"/var/lib/kubelet/checkpoints/checkpoint-{below}.tar"
    node.run(["mkdir", "-p", "/var/lib/kubelet/checkpoints"])
    kept = f"/srv/kept-{below}"
    node.run(
        ["cryoci", "checkpoint", one.id, f"--runtime-root={one.root}", "--leave-running", f"--output={kept}"]
    )
    node.sh('tar -cf "$1" -C "$2" . && rm -r "$2"', archive, kept)
    assert one.end() == "0"

    noted = {
        "restore.criu.org/checkpoint-path.app": archive,
        "restore.criu.org/checkpoint-path.side": "/x.tar",
    }
    two = Container(node, f"copy-{below}", below, noted)
    two.prepare()
    pid = two.monitor()["pid"]
    assert two.state["status"] == "created" and two.state["pid"] == pid
    size = node.sh(f"stat -c %s {two.bundle}/rootfs/data/count.log")
    time.sleep(0.3)
    assert node.sh(f"stat -c %s {two.bundle}/rootfs/data/count.log") == size
    two.call("start", two.id)
    after = workload.wait(node, before["count"] + 3, pid=pid)
    runs_on(before, after)
    assert after["hostname"] == "pod"
    after = workload.wait(
        node, after["count"] + 2, pid=pid
    )  # what was printed before the dump is not in this log
    logged(node, f"{two.directory}/log", f" count {after['count']}\n")
    assert two.end() == "0"

    stranger = Container(node, f"stranger-{below}", below, {**noted, "io.kubernetes.pod.namespace": "other"})
    stranger.prepare()
    report = stranger.monitor()
    assert (
        report["pid"] == -1 and "a pod restores only checkpoints of its own namespace" in report["message"]
    )
    node.run(["ip", "netns", "del", stranger.id])
    assert "runtime" not in records(node)
