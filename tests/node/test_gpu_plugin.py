# SPDX-License-Identifier: Apache-2.0
"""[gpu] engine = "plugin": CRIU's real cuda_plugin.so with our cuda-checkpoint, on the fake driver."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.fakegpu import build
from tests.fakegpu.build import UUIDS
from tests.node import gpu
from tests.node.gpu import Trainer
from tests.node.subject import CONFIG, failing, leftovers
from tests.nodes import cuda_plugin, workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node
ONE = build.devices(UUIDS[:1])
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[NamespaceNode, NamespaceNode, str]]:
    """Two nodes where the plugin finds a driver (it looks at /proc/driver/nvidia/gpus), and a registry."""
    with Cluster(tag="plugin") as cluster:
        a, b = (cluster.start(name, shown=cuda_plugin.shown()) for name in "ab")
        for node in (a, b):
            node.sh("mount -t tmpfs tmpfs /proc/driver && mkdir -p /proc/driver/nvidia/gpus/0000:01:00.0")
        yield a, b, cluster.registry(cluster.start("registry"))


def settings(node: NamespaceNode, below: str, libdir: str = cuda_plugin.PLACE) -> None:
    gpu.equip(node, ONE, below=below)
    node.write(
        CONFIG,
        f'[runtime]\npath = "{below}"\n[gpu]\nengine = "plugin"\nlock-timeout = 20\n[criu]\nlibdir = "{libdir}"\n'
        '[memory]\nthreshold = "64k"\n',  # the driver works while CRIU does, so all memory must stay for it
    )


@pytest.fixture(params=["runc", "crun"])
def trainer(
    nodes: tuple[NamespaceNode, NamespaceNode, str], request: pytest.FixtureRequest
) -> Iterator[Trainer]:
    """A CUDA process with two CUDA children, on node a."""
    for node in nodes[:2]:
        settings(node, request.param)
    made = Trainer(nodes[0], f"p{next(_numbers)}", devices=ONE, children=2).start()
    yield made
    made.remove()


def test_through_a_registry(nodes: tuple[NamespaceNode, NamespaceNode, str], trainer: Trainer) -> None:
    _, b, registry = nodes
    before = trainer.runs_on()
    reference = f"{registry}/plugin/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    assert trainer.status == "gone"
    copy = trainer.restore(reference, on=b)
    after = copy.runs_on()
    assert all(late["count"] > early["count"] for late, early in zip(after, before, strict=True))
    copy.remove()


def test_the_runtimes_own_verbs(nodes: tuple[NamespaceNode, NamespaceNode, str], trainer: Trainer) -> None:
    """As engines call them: CRI-O freezes first. With --leave-running the plugin itself brings CUDA back."""
    node, images = nodes[0], f"/srv/{trainer.name}.images"
    words = ["--image-path", images, "--work-path", f"{images}.work"]
    node.run(["cryoci-runtime", "pause", trainer.name])
    node.run(["cryoci-runtime", "checkpoint", "--leave-running", *words, trainer.name])
    assert trainer.status == "paused"  # as it was found
    node.run(["cryoci-runtime", "resume", trainer.name])
    trainer.runs_on()
    dump = build.valid_dump(node.read(f"{images}/gpu.dump"))
    assert (dump["engine"], dump["plugins"], len(dump["tasks"])) == ("plugin", ["cuda_plugin"], 3)
    assert "cryoci-memory.json" not in node.sh(f"ls {images}")
    log = node.read(f"{images}.work/dump.log").decode()
    assert "cuda_plugin: initialized" in log and log.count("pausing devices on pid") >= 3
    node.run(["rm", "-r", images])
    node.run(["cryoci-runtime", "checkpoint", *words, trainer.name])
    node.run(["cryoci-runtime", "delete", "--force", trainer.name], check=False)
    argv = ["cryoci-runtime", "restore", "--detach", "--bundle", trainer.bundle, *words, trainer.name]
    workload.detach(node, argv, f"{trainer.bundle}.log")
    trainer.runs_on()


def test_a_dump_that_fails(nodes: tuple[NamespaceNode, NamespaceNode, str], trainer: Trainer) -> None:
    """The plugin says why, and brings back what it has locked or checkpointed."""
    for verb, fault in (("lock", "lock 2 600 before"), ("checkpoint", "checkpoint 2 999 before")):
        gpu.faults(nodes[0], fault)
        said = failing(nodes[0], ["cryoci", "checkpoint", trainer.name, "-o", f"/srv/{trainer.name}.out"])
        gpu.faults(nodes[0])
        assert f"the CUDA driver did not checkpoint the GPU: Could not {verb} on process ID" in said
        trainer.runs_on()
    argv = ["cryoci", "checkpoint", trainer.name, "--straight", "-o", "oci:/srv/straight:1"]
    assert "CRIU's CUDA plugin needs all memory" in failing(nodes[0], argv)
    trainer.runs_on()


def test_a_restore_that_the_plugin_calls_a_success(
    nodes: tuple[NamespaceNode, NamespaceNode, str], trainer: Trainer
) -> None:
    """CRIU drops its error (cr-restore.c, RESUME_DEVICES_LATE); every process is asked for its state."""
    a, b, registry = nodes
    reference = f"{registry}/plugin/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    before = leftovers(b)
    gpu.faults(b, "restore 2 2 before")
    said = failing(b, ["cryoci", "restore", reference, "--detach"])
    gpu.faults(b)
    assert "reports success, but of 3 CUDA processes the states are" in said
    assert leftovers(b) == before
    trainer.restore(reference, on=a).runs_on()


def test_a_plugin_that_is_not_there_or_turns_itself_off(
    nodes: tuple[NamespaceNode, NamespaceNode, str], trainer: Trainer
) -> None:
    node = nodes[0]
    below = node.read(CONFIG).decode().split('"')[1]
    settings(node, below, "/opt/none")
    checkpoint = ["cryoci", "checkpoint", trainer.name, "-o", f"/srv/{trainer.name}.out"]
    assert "no cuda_plugin.so in /opt/none" in failing(node, checkpoint)
    settings(node, below)
    node.run(["mv", "/proc/driver/nvidia", "/proc/driver/gone"])
    try:
        # what stands for the GPU's memory is nothing that CRIU could dump
        assert "/secretmem" in failing(node, checkpoint)
    finally:
        node.run(["mv", "/proc/driver/gone", "/proc/driver/nvidia"])
    trainer.runs_on()
    for engine in ("plugin", "none"):
        node.write(CONFIG, f'[runtime]\npath = "{below}"\n[gpu]\nengine = "{engine}"\n')
        said = failing(node, ["cryoci", "park", trainer.name])  # frozen alone it would keep its GPU
        assert f"[gpu] engine is '{engine}'" in said and 'engine = "driver"' in said
        assert trainer.status == "running"
    assert "/secretmem" in failing(node, checkpoint)
    trainer.runs_on()
