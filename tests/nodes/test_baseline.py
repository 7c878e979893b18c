# SPDX-License-Identifier: Apache-2.0
"""What works in a namespace node without cryoci; every other node test stands on this."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode
from tests.nodes.node import NodeError

pytestmark = pytest.mark.node


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The counter went on: it is the same process with the same memory and a later count."""
    assert after["boot"] == before["boot"]
    assert after["memory_sha256"] == before["memory_sha256"]
    assert after["pid"] == before["pid"] and after["child_pid"] == before["child_pid"]
    assert before["count"] < after["count"] < before["count"] + 100
    assert after["child"] > before["child"]
    assert after["open_file"]["position"] == after["open_file"]["size"] > before["open_file"]["size"]


@pytest.mark.parametrize("runtime", ["runc", "crun"])
@pytest.mark.parametrize("rw", ["dir", "overlay"])
def test_bare_runtime(node: NamespaceNode, runtime: str, rw: Literal["dir", "overlay"]) -> None:
    workload.bundle(node, "/srv/c", rw=rw, args=("--hold", "ghost"))
    workload.detach(node, [runtime, "run", "-d", "--bundle", "/srv/c", "c"], "/srv/c.log")
    before = workload.wait(node, 3)
    workload.ask(node, "/write?path=/dev/shm/mark&text=shm")
    node.run([runtime, "checkpoint", "--image-path", "/srv/image", "c"])
    with pytest.raises(NodeError):
        workload.ask(node)
    workload.detach(
        node,
        [runtime, "restore", "-d", "--image-path", "/srv/image", "--bundle", "/srv/c", "c"],
        "/srv/c.log",
    )
    after = workload.wait(node, before["count"] + 3)
    assert_same(before, after)
    assert workload.ask(node, "/read?path=/dev/shm/mark") == {"text": "shm"}
    assert f"count {before['count'] + 3}\n" in node.read("/srv/c.log").decode()
    node.run([runtime, "delete", "-f", "c"])


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_podman_on_another_node(cluster: Cluster, registry: str, runtime: str) -> None:
    """podman's own export and import, with a published port; the image comes from the registry."""
    a, b = cluster.start("a"), cluster.start("b")
    image = f"{registry}/counter:1"
    workload.push(a, image)
    podman = ["podman", "--runtime", runtime]
    a.run([*podman, "run", "-d", "--name", "c", "-p", "8765:8765", image])
    before = workload.wait(b, 3, host=a.address)
    a.run([*podman, "container", "checkpoint", "c", "--export", "/tmp/c.tar"])
    b.write("/tmp/c.tar", a.read("/tmp/c.tar"))
    b.run([*podman, "container", "restore", "--import", "/tmp/c.tar"])
    after = workload.wait(a, before["count"] + 3, host=b.address)
    assert_same(before, after)
    logs = b.sh("podman logs c")
    assert f"count {before['count'] + 3}\n" in logs


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_podman_refuses_what_criu_cannot_dump(node: NamespaceNode, runtime: str) -> None:
    """A Landlock ruleset: no privilege is needed, podman's seccomp profile allows it, CRIU has no image for it."""
    workload.load(node)
    podman = ["podman", "--runtime", runtime]
    command = [*workload.COMMAND, "--hold", "unsupported"]
    node.run([*podman, "run", "-d", "--name", "c", "-p", "8765:8765", workload.IMAGE, *command])
    before = workload.wait(node, 3, host=node.address)
    result = node.run([*podman, "container", "checkpoint", "c", "--export", "/tmp/c.tar"], check=False)
    assert result.returncode != 0
    log = node.sh("cat $(find /var/lib/containers/storage/overlay-containers -name dump.log)")
    assert "Can't dump file" in log and "landlock-ruleset" in log
    assert_same(before, workload.wait(node, before["count"] + 3, host=node.address))


def test_image_is_the_same_everywhere(cluster: Cluster) -> None:
    ids = set()
    for name in ("a", "b"):
        node = cluster.start(name)
        workload.load(node)
        ids.add(json.loads(node.run(["podman", "image", "inspect", workload.IMAGE]).stdout)[0]["Digest"])
    assert len(ids) == 1


def test_restore_leaves_the_hosts_cgroups_alone(node: NamespaceNode) -> None:
    """Without `cgroup-dump-controller` in default.conf, CRIU makes directories in the host's cgroup v1."""
    workload.bundle(node, "/srv/leak")
    workload.detach(node, ["crun", "run", "-d", "--bundle", "/srv/leak", "leak"], "/srv/leak.log")
    count = workload.wait(node, 2)["count"]
    node.run(["crun", "checkpoint", "--image-path", "/srv/image", "leak"])
    restore = ["crun", "restore", "-d", "--image-path", "/srv/image", "--bundle", "/srv/leak", "leak"]
    workload.detach(node, restore, "/srv/leak.log")
    workload.wait(node, count + 2)
    log = node.read("/srv/image/restore.log").decode()
    assert "Cgroups 1 inherited from parent" in log and "cgroup dir" not in log
