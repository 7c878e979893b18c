# SPDX-License-Identifier: Apache-2.0
"""Pods of real engines through the CRI, with the handler that `cryoci install` has made."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.node import commands, cri
from tests.node.subject import CONFIG, runs_on
from tests.nodes.cluster import Cluster
from tests.nodes.machine import Machine
from tests.nodes.node import Node

pytestmark = [pytest.mark.machine, pytest.mark.timeout(900)]
_KLOG = re.compile(r"^E\d{4} [\d:.]+ +\d+ ", re.M)  # crictl's time and pid
belows = pytest.mark.parametrize("below", ["runc", "crun"])


@dataclass(frozen=True)
class Place:
    engine: cri.Engine
    registry: str

    @property
    def node(self) -> Node:
        return self.engine.node

    def prefer(self, below: str) -> None:
        self.node.write(CONFIG, f'[runtime]\npath = "{below}"\n')


@pytest.fixture(scope="module")
def equipped() -> Iterator[tuple[Machine, str]]:
    """One machine for all engines, one after another, and a registry."""
    cri.given("crictl")
    with Cluster(tag="cri") as cluster:
        registry = cluster.registry(cluster.start("registry"))
        node = cluster.machine("node")
        cri.equip(node)
        yield node, registry


@pytest.fixture(scope="module", params=["containerd-1", "containerd-2", "crio"])
def place(request: pytest.FixtureRequest, equipped: tuple[Machine, str]) -> Iterator[Place]:
    node, registry = equipped
    if request.param == "crio":
        cri.given("crio", "pinns")
    engine = cri.Engine(node, cri.KINDS[request.param])
    said = engine.start()
    assert "+# what a RuntimeClass" in said or "+[plugins." in said
    yield Place(engine, registry)
    engine.stop()


def _lines(pod: str, container: str) -> list[str]:
    return [
        f"crictl ps --id {container} -o json | grep -e '\"state\"' -e '\"name\"'",
        f"crictl start {container}; sleep 1",
        f"crictl start {container}",
        f"crictl ps --id {container} -o json | grep -e '\"state\"' -e '\"name\"'",
        f"crictl exec {container} sh -c 'echo out; echo err >&2; exit 7'",
        f"crictl exec --sync {container} sh -c 'echo out; exit 3'",
        f"crictl exec {container} /none",
        f"crictl exec {container} cat /sys/fs/cgroup/memory.max /proc/self/cgroup",
        f"crictl exec {container} id",
        f"crictl logs {container} | head -1 | cut -d' ' -f1",
        f"crictl stats --id {container} -o json | grep -c workingSetBytes",
        f"crictl inspect {container} | grep -e '\"state\"' -e exitCode -e '\"reason\"'",
        f"crictl update --memory 220200960 {container}; crictl exec {container} cat /sys/fs/cgroup/memory.max",
        f"crictl inspectp {pod} | grep -e '\"state\"' -e '\"runtimeHandler\"'",
        f"crictl rm {container}",
        f"crictl stop --timeout 5 {container}",
        f"crictl inspect {container} | grep -e '\"state\"' -e exitCode -e '\"reason\"'",
        f"crictl exec {container} true",
        f"crictl rm {container}",
        f"crictl inspect {container}",
        f"crictl stopp {pod}; crictl rmp {pod}",
    ]


@belows
def test_commands(place: Place, below: str) -> None:
    """A pod's life with the handler cryoci is word for word that with the runtime below it."""
    place.prefer(below)
    engine = place.engine
    answers = []
    for handler in (below, "cryoci"):
        name = f"life-{below}-{handler}"
        pod = engine.pod(name, handler)
        container = engine.container(pod)
        said = commands.answers(
            place.node, _lines(pod[0], container), name, pod[0], container, f'"{handler}"'
        )
        answers.append([dataclasses.replace(one, err=_KLOG.sub("", one.err)) for one in said])
    bare, ours = answers
    assert [a.status for a in bare].count(0) >= 12
    for theirs, mine in zip(bare, ours, strict=True):
        assert mine == theirs


@belows
def test_checkpoint_and_annotated_create(place: Place, below: str) -> None:
    """The engine's own checkpoint where it has one, then a pod whose annotation brings it back."""
    place.prefer(below)
    engine, node = place.engine, place.node
    pod = engine.pod(f"origin-{below}")
    container = engine.started(pod)
    before = engine.wait(container, 3)
    image = f"{place.registry}/pods/{engine.kind.name}-{below}:1"
    archive = f"/srv/{engine.kind.name}-{below}.tar"
    asked = engine.crictl("checkpoint", f"--export={archive}", container, check=False)
    if engine.kind.name == "containerd-1":
        assert asked.returncode != 0 and b"CheckpointContainer not implemented" in asked.stderr
        words = (f"--runtime-root={engine.kind.root(below)}", "--leave-running", f"--output={image}")
        node.run(["cryoci", "checkpoint", container, *words], timeout=120)
    else:
        assert asked.returncode == 0, asked.stderr.decode() + engine.log
        found = json.loads(node.run(["cryoci", "inspect", archive, "--json"]).stdout)
        assert "app" in json.dumps(found)
        node.run(["cryoci", "push", archive, image], timeout=120)
    runs_on(before, engine.wait(container, before["count"] + 3))
    engine.end(pod, container)

    again = engine.pod(f"copy-{below}", annotations={"io.cryoci.restore.app": image})
    copy = engine.container(again)
    assert json.loads(engine.say("inspect", copy))["status"]["state"] == "CONTAINER_CREATED"
    engine.crictl("start", copy)
    after = engine.wait(copy, before["count"] + 3)
    runs_on(before, after)
    assert after["hostname"] == f"copy-{below}"
    assert f"count {after['count']}" in engine.say("logs", copy)
    assert engine.say("exec", copy, "echo", "here") == "here"
    engine.end(again, copy)
