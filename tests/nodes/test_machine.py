# SPDX-License-Identifier: Apache-2.0
"""Machine nodes: boot, obey, share the network, and give what the host's kernel does not."""

from __future__ import annotations

import socket
import time

import pytest

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.machine import Machine
from tests.nodes.node import NodeError


def test_own_kernel_and_controllers(machine: Machine) -> None:
    assert machine.sh("uname -r").strip().endswith("-cloud-amd64")
    assert {"cpu", "memory", "pids", "cpuset"} <= set(
        machine.read("/sys/fs/cgroup/cgroup.controllers").decode().split()
    )
    assert "Looks good" in machine.sh("criu check 2>&1")
    assert machine.sh("hostname").strip() == "machine" != socket.gethostname()


def test_commands(machine: Machine) -> None:
    result = machine.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, b"in", b"err\n")
    big = bytes(range(256)) * 8192
    assert machine.run(["cat"], input=big).stdout == big
    assert machine.run(["nope"], check=False).returncode == 127
    with pytest.raises(NodeError, match=r"gave no answer within 0\.5 s"):
        machine.run(["sleep", "614"], timeout=0.5)
    assert "sleep 614" not in machine.sh("ps axo args")
    started = time.monotonic()
    machine.sh("sleep 600 &")  # a daemon that keeps stdout must not hold the command
    assert time.monotonic() - started < 10


@pytest.mark.more
def test_podman_with_its_defaults(machine: Machine) -> None:
    """Checkpoint and restore by podman and runc, with nothing in containers.conf but the runtimes table."""
    workload.load(machine)
    podman = ["podman", "--runtime", "runc"]
    machine.run([*podman, "run", "-d", "--name", "c", "-p", "8765:8765", workload.IMAGE])
    before = workload.wait(machine, 3, host=machine.address, timeout=60)
    limit = machine.sh("cat /sys/fs/cgroup/libpod_parent/libpod-*/pids.max").strip()
    assert limit.isdigit()  # the default pids limit is in force
    machine.run([*podman, "container", "checkpoint", "c", "--export", "/tmp/c.tar"])
    machine.run([*podman, "rm", "-f", "c"])
    machine.run([*podman, "container", "restore", "--import", "/tmp/c.tar"])
    after = workload.wait(machine, before["count"] + 3, host=machine.address, timeout=60)
    assert (after["boot"], after["memory_sha256"]) == (before["boot"], before["memory_sha256"])


def test_shares_the_network_with_namespace_nodes(machine: Machine, machine_cluster: Cluster) -> None:
    registry = machine_cluster.registry(machine_cluster.start("registry"))
    machine.run(
        ["skopeo", "copy", "-q", f"oci-archive:{workload.ARCHIVE}", f"docker://{registry}/counter:1"]
    )
    machine.cut()
    inspect = ["skopeo", "inspect", "--retry-times", "0", f"docker://{registry}/counter:1"]
    with pytest.raises(NodeError):
        machine.run(inspect, timeout=5)
    machine.join()
    machine.run(inspect)


def test_kill(machine_cluster: Cluster) -> None:
    victim = machine_cluster.machine("victim", memory_mib=512)
    victim.kill()
    assert not victim.alive and not victim.cgroup.exists()
    with pytest.raises(NodeError, match="is not running"):
        victim.run(["true"])
