# SPDX-License-Identifier: Apache-2.0
"""`cryoci restore` of what containerd 1.7, containerd 2 and CRI-O have made, on another node; ctr's own restore."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.node import crio
from tests.node.conftest import Site
from tests.node.subject import CONFIG, KINDS, SMALL, Kind, Subject, failing, leftovers, runs_on
from tests.nodes import tree, workload
from tests.nodes.namespace import NamespaceNode
from tests.nodes.node import ENVIRONMENT

pytestmark = pytest.mark.node

SHIM = "/usr/local/bin/cryoci-runtime"
belows = pytest.mark.parametrize("below", ["runc", "crun"])


@dataclass
class Containerd:
    """A containerd of `version` on `node`, and its ctr. Containers are cryoci-runtime's."""

    node: NamespaceNode
    version: int
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.version == 2:
            self.env["PATH"] = f"{tree.NEW_CONTAINERD}/usr/bin:{ENVIRONMENT['PATH']}"

    def start(self) -> None:
        self.sh("setsid containerd >/var/log/containerd.log 2>&1 </dev/null &")
        self.sh("for i in $(seq 200); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1")
        assert f"Version:  {self.version}." in self.ctr("version")

    def stop(self) -> None:
        self.sh("pkill -x containerd; while pgrep -x containerd; do sleep 0.05; done")
        self.node.run(["find", "/var/lib/containerd", "/run/containerd", "-mindepth", "1", "-delete"])

    def sh(self, script: str) -> str:
        return self.node.run(["/bin/sh", "-c", script], env=self.env).stdout.decode()

    def ctr(self, *words: str, check: bool = True) -> str:
        return self.node.run(["ctr", *words], env=self.env, check=check, timeout=120).stdout.decode()

    def run(self, name: str, image: str, below: str, *options: str) -> None:
        self.node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
        words = ("--runc-binary", SHIM, "--cpu-shares=0", *options)
        self.ctr("run", "--detach", *words, image, name, *workload.COMMAND, *SMALL)

    def pid(self, name: str) -> int:
        rows = (line.split() for line in self.ctr("task", "ls").splitlines())
        return next(int(row[1]) for row in rows if row[0] == name)

    def wait(self, name: str, count: int) -> dict[str, Any]:
        return workload.wait(self.node, count, pid=self.pid(name))

    def remove(self, name: str) -> None:
        self.ctr("task", "kill", "--signal=KILL", name)
        self.sh(f"while ctr task ls | grep '^{name} ' | grep -q RUNNING; do sleep 0.05; done")
        self.ctr("task", "rm", name, check=False)  # its status is that of the container
        self.ctr("container", "rm", name)
        self.node.run(["rm", CONFIG])


@pytest.fixture(scope="module", params=[1, 2], ids=["containerd-1.7", "containerd-2"])
def containerd(request: pytest.FixtureRequest, site: Site) -> Iterator[Containerd]:
    """On node a, with the counter from the registry."""
    made = Containerd(site.a, request.param)
    made.start()
    made.ctr("image", "pull", "--plain-http", site.image)
    yield made
    made.stop()


@belows
def test_ctrs_own_restore(site: Site, containerd: Containerd, below: str) -> None:
    name, copy = f"own-{below}", f"own-{below}-copy"
    image = f"localhost/{name}:1"
    containerd.run(name, site.image, below, "--net-host")
    before = containerd.wait(name, 3)
    containerd.ctr("container", "checkpoint", "--image", "--task", "--rw", name, image)
    runs_on(before, containerd.wait(name, before["count"] + 3))
    containerd.remove(name)
    containerd.node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    containerd.ctr("container", "restore", "--rw", "--live", copy, image)
    runs_on(before, containerd.wait(copy, before["count"] + 3))
    assert (
        len(containerd.ctr("task", "ps", copy).splitlines()) == 3
    )  # a head, and both in the container's cgroup
    containerd.remove(copy)


def test_restored_by_cryoci_elsewhere(site: Site, containerd: Containerd) -> None:
    """Under podman, which is there, and bare: the base image comes by its digest, to wherever it is needed."""
    below = {1: "runc", 2: "crun"}[containerd.version]
    name, node = f"away-{below}", site.b
    containerd.run(name, site.image, below)
    containerd.wait(name, 3)
    pid = containerd.pid(name)
    workload.ask(site.a, "/write?path=/root/new&text=here", pid=pid)
    site.a.run(["nsenter", "-t", str(pid), "-m", "rm", "/usr/bin/tac"])
    before = containerd.wait(name, 3)
    image, archive = f"localhost/{name}:1", f"/srv/{name}.tar"
    containerd.ctr("container", "checkpoint", "--image", "--task", "--rw", name, image)
    containerd.remove(name)
    containerd.ctr("image", "export", "--skip-manifest-json", "--all-platforms", archive, image)
    node.write(archive, site.a.read(archive))
    _restores_everywhere(node, archive, name, below, "containerd", before)
    node.run(["rm", archive])


def _restores_everywhere(
    node: NamespaceNode, reference: str, name: str, below: str, made_under: str, before: dict[str, Any]
) -> None:
    """Under podman, the choice of cryoci, and bare; each leaves nothing behind."""
    clean = leftovers(node)
    for kind in (Kind("podman", "cryoci-runtime", below), KINDS[below]):
        subject = Subject(node, kind, name)
        argv = ["cryoci", "restore", reference, "--detach", "--name", name]
        if kind.podman:
            said = node.run(argv, timeout=120).stderr.decode()
            assert f"\ncryoci: made under {made_under}, restored under podman of this node\n" in said
        else:
            workload.detach(node, [*argv, "--engine", below], subject.log)
            subject.restored = True
        after = subject.wait(before["count"] + 3)
        assert (after["boot"], after["memory_sha256"]) == (before["boot"], before["memory_sha256"])
        assert after["child"] > before["child"] and len(subject.cgroups) == 1
        if made_under == "containerd":
            assert subject.ask("/read?path=/root/new") == {"text": "here"}
        else:
            assert subject.inside("cat", "/etc/hosts").startswith("127.0.0.1")
            assert subject.inside("cat", "/dev/termination-log") == ""
            assert subject.inside("ls", "/var/run/secrets/kubernetes.io/serviceaccount") == ""
        assert not subject.has("/usr/bin/tac") and subject.has("/usr/bin/cat")
        subject.remove()
        assert leftovers(node) == clean


@belows
def test_crios_archive(site: Site, below: str) -> None:
    """Of a pod: its network namespace and the kubelet's mounts were not the container's own."""
    node, origin = site.b, site.a
    origin.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    one = crio.Container(origin, f"pod-{below}", below, kubelet=True)
    one.prepare()
    pid = one.monitor()["pid"]
    one.call("start", one.id)
    before = workload.wait(origin, 3, pid=pid)
    one.call("pause", one.id)
    one.checkpoint()
    archive = f"/srv/crio-{below}.tar"
    digest = origin.sh(f"skopeo inspect --format '{{{{.Digest}}}}' docker://{site.image}").strip()
    one.export(archive, f"{site.image.rpartition(':')[0]}@{digest}")
    one.call("resume", one.id)
    node.write(archive, origin.read(archive))
    assert one.end() == "0"
    origin.run(["rm", CONFIG])
    image = f"{site.registry}/pods/{one.id}:1"
    if below == "crun":  # as a kubelet's archives travel
        node.run(["cryoci", "push", archive, image])
    _restores_everywhere(node, image if below == "crun" else archive, one.id, below, "CRI-O", before)
    _fails_everywhere(node, archive, below)
    node.run(["rm", archive])


def _fails_everywhere(node: NamespaceNode, archive: str, below: str) -> None:
    """Of a damaged checkpoint nothing is left: no container, bundle, file system or network namespace."""
    damaged = f"/srv/damaged-{below}"
    node.run(["cryoci", "pull", archive, damaged])
    node.run(["rm", f"{damaged}/checkpoint/core-1.img"])
    clean = leftovers(node)
    for engine in ("podman", below):
        said = failing(node, ["cryoci", "restore", damaged, "--detach", f"--engine={engine}", "--name=x"])
        assert "a CRIU image file is missing" in said
        assert leftovers(node) == clean
    node.run(["rm", "-r", damaged])
