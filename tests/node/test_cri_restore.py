# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real CRI-O and containerd 2 through the CRI, and each way back: its own, annotated, by podman.

In a namespace node, which has no cgroup controllers: runtimes there leave limits out. With limits: test_cri.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.node import cri
from tests.node.subject import CONFIG, failing
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

belows = pytest.mark.parametrize("below", ["runc", "crun"])
# The runtime, less what needs controllers and CAP_SYS_RESOURCE.
_UNLIMITED = """#!/usr/bin/python3
import json, os, sys
words = sys.argv[1:]
if {{"create", "restore"}} & set(words):
    path = (words[words.index("--bundle") + 1] if "--bundle" in words else ".") + "/config.json"
    spec = json.load(open(path))
    spec["linux"].pop("resources", None), spec["process"].pop("oomScoreAdj", None)
    json.dump(spec, open(path, "w"))
os.execv({program!r}, [{program!r}, *words])
"""


@dataclass(frozen=True)
class Place:
    engine: cri.Engine
    registry: str

    def checkpoint(self, name: str, below: str, **more: Any) -> tuple[str, dict[str, Any]]:
        """The engine's archive of a counter in a pod that ends then, and its last words."""
        self.engine.node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
        pod = self.engine.pod(name)
        container = self.engine.started(pod, **more)
        before = self.engine.wait(container, 3)
        archive = f"/srv/{name}.tar"
        self.engine.crictl("checkpoint", f"--export={archive}", container)
        self.engine.end(pod, container)
        return archive, before

    def runs(self, pod: str, container: str, before: dict[str, Any]) -> dict[str, Any]:
        """It runs on in this pod, is logged and takes exec; returns what it says."""
        after = self.engine.wait(container, before["count"] + 3)
        _same(before, after)
        assert f"count {after['count']}" in self.engine.say("logs", container)
        assert self.engine.say("exec", container, "echo", "here") == "here"
        return after


@pytest.fixture(scope="module")
def equipped() -> Iterator[tuple[NamespaceNode, str]]:
    cri.given("crictl")
    with Cluster(tag="crires") as cluster:
        registry = cluster.registry(cluster.start("registry"))
        node = cluster.start("node")
        cri.equip(node)
        for program in ("/usr/sbin/runc", "/usr/bin/crun"):
            text = _UNLIMITED.format(program=program)
            node.write(f"/usr/local/sbin/{program.rpartition('/')[2]}", text, mode=0o755)
        yield node, registry


@pytest.fixture(scope="module", params=["containerd-2", "crio"])
def place(request: pytest.FixtureRequest, equipped: tuple[NamespaceNode, str]) -> Iterator[Place]:
    if request.param == "crio":
        cri.given("crio", "pinns")
    engine = cri.Engine(equipped[0], cri.KINDS[request.param])
    engine.start()
    yield Place(engine, equipped[1])
    engine.crictl("rmp", "--all", "--force", check=False)
    engine.node.sh(f"pkill -x {engine.kind.daemon} || true")


def _same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert (after["boot"], after["memory_sha256"]) == (before["boot"], before["memory_sha256"])


@belows
def test_annotated_create(place: Place, below: str) -> None:
    """The engine's archive as it is, into a pod of another name, which keeps that."""
    engine = place.engine
    archive, before = place.checkpoint(f"noted-{below}", below)
    image = f"{place.registry}/pods/{engine.kind.name}-{below}:1"
    engine.node.run(["cryoci", "push", archive, image])
    pod = engine.pod(f"anew-{below}", annotations={"io.cryoci.restore.app": image})
    copy = engine.container(pod)
    assert json.loads(engine.say("inspect", copy))["status"]["state"] == "CONTAINER_CREATED"
    engine.crictl("start", copy)
    assert place.runs(pod[0], copy, before)["hostname"] == f"anew-{below}"
    engine.end(pod, copy)


@belows
def test_crios_own_restore(place: Place, below: str) -> None:
    """CRI-O restores when the image of a container is a checkpoint's archive."""
    engine = place.engine
    if engine.kind.name != "crio":
        pytest.skip("containerd 2.1 wants a base image that it can pull, and no registry speaks TLS here")
    archive, before = place.checkpoint(f"first-{below}", below)
    pod = engine.pod(f"second-{below}")
    copy = engine.started(pod, image=archive)
    place.runs(pod[0], copy, before)
    log = engine.node.sh(f"cat $(find /run/cryoci -path '*{copy}*/restore.log')")
    assert "Restore finished successfully" in log
    engine.end(pod, copy)


@belows
def test_restored_by_podman(place: Place, below: str) -> None:
    """Without pod, kubelet and engine; a container that shared its pod's processes is refused."""
    node = place.engine.node
    archive, before = place.checkpoint(f"leaves-{below}", below, own_processes=True)
    said = node.run(["cryoci", "restore", archive, "--detach", "--name=out"], timeout=120).stderr.decode()
    assert "restored under podman of this node" in said
    pid = int(node.sh("podman inspect --format={{.State.Pid}} out"))
    _same(before, workload.wait(node, before["count"] + 3, pid=pid))
    node.run(["podman", "rm", "--force", "--time=0", "out"])
    if place.engine.kind.daemon == "containerd":  # CRI-O without its pause container shares none
        archive, _ = place.checkpoint(f"shared-{below}", below)
        said = failing(node, ["cryoci", "restore", archive, "--detach", "--name=out"])
        assert "shared the processes of its pod" in said
