# SPDX-License-Identifier: Apache-2.0
"""CRI-O's exact way of calling, by the real conmon, and its archives: CRI-O itself is not packaged.

Command lines and environment as in CRI-O 1.36: internal/oci/runtime_oci.go (CreateContainer, StartContainer,
CheckpointContainer, runtimeCmd); what follows from conmon's are conmon's own (src/runtime_args.c). Archives as
exportCheckpoint writes them (internal/lib/checkpoint.go).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from tests.node.subject import SMALL
from tests.nodes import workload
from tests.nodes.namespace import NamespaceNode

SHIM = "/usr/local/bin/cryoci-runtime"
# What a kubelet and CRI-O mount into each container: destination -> is it a directory.
KUBELETS = {
    "/etc/hosts": False,
    "/etc/hostname": False,
    "/etc/resolv.conf": False,
    "/dev/termination-log": False,
    "/dev/shm": True,
    "/var/run/secrets/kubernetes.io/serviceaccount": True,
}
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
    kubelet: bool = False
    args: tuple[str, ...] = SMALL

    @property
    def bundle(self) -> str:
        return f"/srv/containers/{self.id}/bundle"

    @property
    def hostname(self) -> str:
        return f"pod-{self.id}"

    @property
    def directory(self) -> str:
        return f"/srv/containers/{self.id}/userdata"

    def prepare(self) -> None:
        """The bundle, with network and UTS namespaces that a sandbox has made."""
        spec = workload.bundle(self.node, self.bundle, args=self.args, network=True)
        self.node.sh(
            'mkdir -p "$1" /var/run/crio/exits /var/run/crio && ip netns add "$2" && ip -n "$2" link set lo up',
            self.directory,
            self.id,
        )
        self.node.sh(
            'mkdir -p /run/utsns && touch "/run/utsns/$1" && unshare "--uts=/run/utsns/$1" true', self.id
        )
        for one in spec["linux"]["namespaces"]:
            if one["type"] in ("network", "uts"):
                one["path"] = f"/run/{one['type'].removesuffix('work')}ns/{self.id}"
        spec["hostname"] = self.hostname
        spec["linux"]["cgroupsPath"] = f"/kubepods/crio-{self.id}"
        spec["annotations"] = {
            "io.container.manager": "cri-o",
            "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.container.name": "app",
            "io.kubernetes.pod.namespace": "team",
            **self.noted,
        }
        if self.kubelet:
            spec["mounts"] = [m for m in spec["mounts"] if m["destination"] not in KUBELETS]
            spec["mounts"] += [self._mount(place, folder) for place, folder in KUBELETS.items()]
        self.node.write(f"{self.bundle}/config.json", json.dumps(spec))

    def _mount(self, place: str, folder: bool) -> dict[str, Any]:
        source = f"/srv/containers/{self.id}/kubelet{place}"
        make = 'mkdir -p "$1"' if folder else 'mkdir -p "$(dirname "$1")" && echo "# theirs" >"$1"'
        self.node.sh(make, source)
        return {
            "destination": place,
            "type": "bind",
            "source": source,
            "options": ["rbind", "rprivate", "rw"],
        }

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

    def checkpoint(self) -> None:
        """CheckpointContainer, of a container that is paused."""
        where = ("--image-path", f"{self.directory}/checkpoint", "--work-path", self.directory)
        self.call("checkpoint", "--file-locks", *where, "--leave-running", self.id)

    def export(self, archive: str, image: str) -> None:
        """exportCheckpoint, of a container that is paused and checkpointed; `image` is NAME@DIGEST, of its root."""
        config = {
            "id": self.id.encode().hex().ljust(64, "0")[:64],
            "name": f"k8s_app_pod_team_{self.id}_0",
            "rootfsImage": image.partition("@")[0],
            "rootfsImageRef": "ab" * 32,  # an id that only the first node knows
            "rootfsImageName": image,
            "runtime": "cryoci",
            "createdTime": "2026-11-01T10:00:00Z",
            "checkpointedTime": "2026-11-01T11:00:00Z",
        }
        self.node.write(f"{self.directory}/config.dump", json.dumps(config))
        self.node.write(f"{self.directory}/deleted.files", '["/usr/bin/tac"]')
        script = """
            cp "$1/config.json" "$2/spec.dump" && cp "$2/log" "$2/io.kubernetes.cri-o.LogPath"
            tar -cf "$2/rootfs-diff.tar" -C "$1/rootfs" data
            cd "$2" && tar -cf "$3" config.dump spec.dump checkpoint stats-dump dump.log rootfs-diff.tar \\
                deleted.files io.kubernetes.cri-o.LogPath
        """
        self.node.sh(script, self.bundle, self.directory, archive)

    def forget(self) -> None:
        """RemovePodSandbox."""
        self.node.sh('ip netns del "$1" && umount "/run/utsns/$1" && rm "/run/utsns/$1"', self.id)

    def end(self) -> str:
        """StopContainer and DeleteContainer; returns the exit status that conmon has noted."""
        self.call("kill", self.id, "15")
        exits = f"/var/run/crio/exits/{self.id}"
        self.node.sh('for i in $(seq 100); do [ -s "$1" ] && exit 0; sleep 0.05; done; exit 1', exits)
        status = self.node.read(exits).decode()
        self.call("delete", "--force", self.id)
        self.node.sh('rm "$1"', exits)
        self.forget()
        return status


def logged(node: NamespaceNode, path: str, text: str) -> None:
    """Wait for `text` in a log that conmon writes, which reads its pipe when it comes to it."""
    deadline = time.monotonic() + 20
    while text not in (said := node.read(path).decode()):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
