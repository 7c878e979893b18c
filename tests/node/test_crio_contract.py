# SPDX-License-Identifier: Apache-2.0
"""CRI-O's command lines, replayed by the real conmon (tests/node/crio.py), over runc and over crun."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.crio import SHIM, Container, logged
from tests.node.subject import CONFIG, SMALL, records, runs_on
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def crio() -> Iterator[NamespaceNode]:
    with Cluster(tag="crio") as cluster:
        yield cluster.start("node")


def running(
    node: NamespaceNode, name: str, below: str, **more: Any
) -> tuple[Container, int, dict[str, Any]]:
    """A container that counts, its pid, and what it told; the runtime below is the node's from now on."""
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    one = Container(node, f"{name}-{below}", below, **more)
    one.prepare()
    pid = one.monitor()["pid"]
    assert one.state["status"] == "created" and one.state["pid"] == pid
    one.call("start", one.id)
    return one, pid, workload.wait(node, 3, pid=pid)


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_checkpoint_and_restore(crio: NamespaceNode, below: str) -> None:
    node = crio
    one, pid, before = running(node, "first", below)
    node.run([SHIM, "checkpoint", "--help"])  # CRRuntimeSupportsCheckpointRestore
    images = f"{one.directory}/checkpoint"
    one.call("pause", one.id)
    one.checkpoint()
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
    one, _, before = running(node, "origin", below)
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
    assert after["hostname"] == two.hostname != before["hostname"]
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
    stranger.forget()
    assert "runtime" not in records(node)


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_a_checkpoint_that_fails(crio: NamespaceNode, below: str) -> None:
    """crio sees the runtime's own exit status and finds dump.log where it looks; what it resumes runs on."""
    node = crio
    one, pid, before = running(node, "held", below, args=(*SMALL, "--hold", "unsupported"))
    one.call("pause", one.id)
    where = ["--image-path", f"{one.directory}/checkpoint", "--work-path", one.directory]
    words = ["--root", one.root, "checkpoint", "--file-locks", *where, "--leave-running", one.id]
    ours = node.run([SHIM, *words], check=False, env={"CRI_O_EXTERNAL": "1"})
    assert "of a kind that CRIU cannot dump" in ours.stderr.decode()
    assert "Can't dump file" in node.read(f"{one.directory}/dump.log").decode()
    bare = node.run([below, *words], check=False)
    assert ours.returncode == bare.returncode != 0
    assert one.state["status"] == "paused"
    one.call("resume", one.id)
    runs_on(before, workload.wait(node, before["count"] + 3, pid=pid))
    assert one.end() == "0"
    assert "runtime" not in records(node)


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_a_restore_that_fails(crio: NamespaceNode, below: str) -> None:
    """conmon reports no pid and the cause; crio's clean-up finds nothing that is left, and may try again."""
    node = crio
    one, _, before = running(node, "whole", below)
    one.call("pause", one.id)
    one.checkpoint()
    node.run(["cp", "-a", f"{one.bundle}/rootfs/data", f"{one.directory}/files"])
    one.call("resume", one.id)
    assert one.end() == "0"

    two = Container(node, f"broken-{below}", below)
    two.prepare()
    images = f"{two.directory}/checkpoint"
    node.sh(
        'cp -a "$1"/files/. "$2"/rootfs/data && cp -a "$1"/checkpoint "$3"',
        one.directory,
        two.bundle,
        images,
    )
    words = ("--restore", images, "--runtime-opt")
    # what CRI-O adds where the pod has SELinux labels, on a node without SELinux
    report = two.monitor(*words, "--lsm-profile=selinux:system_u:system_r:container_t:s0:c1,c2")
    assert report["pid"] == -1 and "the security profile (AppArmor or SELinux)" in report["message"]
    node.sh('mv "$1"/core-1.img "$1"/core-1.away', images)
    report = two.monitor("--restore", images)
    assert report["pid"] == -1 and "a CRIU image file is missing" in report["message"]
    assert "core-1.img" in node.sh("cat $(find /run/cryoci -path '*broken-*/restore.log')")
    for verb, status in (("state", 1), ("delete", 0)):
        call = ["--root", two.root, verb, *(["--force"] if verb == "delete" else []), two.id]
        ours, bare = (node.run([program, *call], check=False) for program in (SHIM, below))
        assert ours.returncode == bare.returncode == status
    assert "runtime" not in records(node)
    node.sh('mv "$1"/core-1.away "$1"/core-1.img', images)
    pid = two.monitor("--restore", images)["pid"]
    after = workload.wait(node, before["count"] + 3, pid=pid)
    assert (after["boot"], after["memory_sha256"]) == (before["boot"], before["memory_sha256"])
    assert two.end() == "0"
