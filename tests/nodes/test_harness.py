# SPDX-License-Identifier: Apache-2.0
"""The harness itself: nodes are separate, obey, and leave nothing however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cryoci.errors import ConflictError
from tests.nodes import host, tree
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode
from tests.nodes.node import NodeError

pytestmark = pytest.mark.node
Two = tuple[NamespaceNode, NamespaceNode]

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 9000), 1)"
LISTEN = (
    "import socket, time; s = socket.create_server(('', 9000)); print('up', flush=True); time.sleep(600)"
)


def reaches(source: NamespaceNode, target: str) -> bool:
    return source.run(["python3", "-c", CONNECT, target], check=False).returncode == 0


def test_nodes_are_machines_of_their_own(two_nodes: Two) -> None:
    a, b = two_nodes
    assert (a.sh("hostname"), b.sh("hostname")) == ("a\n", "b\n")
    a.write("/etc/only-a", "x")
    assert b.run(["test", "-e", "/etc/only-a"], check=False).returncode == 1
    assert not (tree.debian() / "etc/only-a").exists()
    assert a.run(["test", "-e", str(tree.REPO)], check=False).returncode == 1
    assert int(a.sh("ls -d /proc/[0-9]* | wc -l")) < 8
    assert sorted(a.sh("ls /sys/class/net").split()) == ["eth0", "lo"]
    assert a.sh("cat /proc/self/cgroup").splitlines()[-1] == "0::/init"


def test_host_sees_a_nodes_processes_in_its_cgroup(node: NamespaceNode) -> None:
    process = node.popen(["sleep", "600"])
    time.sleep(0.1)
    found = [Path(f"/proc/{p}/cmdline").read_bytes() for p in host.members(node.cgroup)]
    assert b"sleep\x00600\x00" in found
    process.kill()
    process.wait()


def test_criu_works_in_a_node(node: NamespaceNode) -> None:
    assert "Looks good" in node.sh("criu check 2>&1")


def test_cryoci_of_this_checkout_is_installed(node: NamespaceNode) -> None:
    installed = node.read(f"{tree.SITE}/cryoci/errors.py")
    assert installed == (tree.REPO / "cryoci/errors.py").read_bytes()
    launcher = node.sh("readlink -f /usr/local/bin/cryoci-runtime").strip()
    assert node.read(launcher) == (tree.REPO / "shim/launcher.py").read_bytes()
    node.run(["test", "-x", launcher])


def test_run_returns_output_and_status(node: NamespaceNode) -> None:
    result = node.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, b"in", b"err\n")
    assert node.run(["printenv", "X"], env={"X": "y"}).stdout == b"y\n"
    assert b"SSL_CERT" not in node.run(["env"]).stdout
    assert node.run(["sh", "-c", "kill -9 $$"], check=False).returncode == -signal.SIGKILL


def test_failed_run_says_what_to_paste(node: NamespaceNode) -> None:
    with pytest.raises(NodeError) as e:
        node.run(["sh", "-c", "echo why >&2; exit 5"])
    assert "why" in str(e.value) and "status 5" in str(e.value)
    assert f"nsenter -t {node.pid} -a sh -c 'echo why >&2; exit 5'" in str(e.value)


def test_timeout_kills_the_command(node: NamespaceNode) -> None:
    with pytest.raises(NodeError, match=r"gave no answer within 0\.2 s"):
        node.run(["sleep", "612"], timeout=0.2)
    end = time.monotonic() + 5
    while "sleep 612" in node.sh("ps axo args"):
        assert time.monotonic() < end, "sleep outlived its timeout"


def test_popen_streams_and_kill_reaches_the_command(node: NamespaceNode) -> None:
    process = node.popen(["sh", "-c", "echo one; echo two; exec sleep 613"])
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == [b"one\n", b"two\n"]
    process.kill()
    process.wait()
    end = time.monotonic() + 5
    while "sleep 613" in node.sh("ps axo args"):
        assert time.monotonic() < end, "the command outlived its Popen"


def test_files_are_seen_from_both_sides(node: NamespaceNode) -> None:
    node.write("/run/deep/down", b"\x00bytes", mode=0o600)  # /run is a tmpfs of the node
    assert node.read("/run/deep/down") == node.path("/run/deep/down").read_bytes() == b"\x00bytes"
    assert node.path("/run/deep/down").stat().st_mode & 0o777 == 0o600
    with pytest.raises(NodeError, match="No such file"):
        node.read("/nothing")


def test_cut_and_join_the_network(two_nodes: Two) -> None:
    a, b = two_nodes
    server = b.popen(["python3", "-c", LISTEN])
    assert server.stdout is not None and server.stdout.readline() == b"up\n"
    assert reaches(a, "b") and reaches(a, b.address)
    b.cut()
    assert not reaches(a, b.address)
    b.join()
    assert reaches(a, b.address)


def test_clusters_with_the_same_addresses_do_not_meet(node: NamespaceNode) -> None:
    server = node.popen(["python3", "-c", LISTEN])
    assert server.stdout is not None and server.stdout.readline() == b"up\n"
    with Cluster(tag="other") as other:
        other.start("filler")
        stranger = other.start("stranger")
        assert not reaches(stranger, node.address)
        assert stranger.cgroup != node.cgroup
    assert reaches(node, node.address)


def test_killed_node_is_gone_and_others_live(cluster: Cluster, two_nodes: Two) -> None:
    a, b = two_nodes
    a.popen(["sleep", "600"])
    a.sh(
        "mkdir /sys/fs/cgroup/inner; sleep 600 >/dev/null 2>&1 & echo $! >/sys/fs/cgroup/inner/cgroup.procs"
    )
    a.kill()
    assert not a.alive and not a.cgroup.exists()
    with pytest.raises(NodeError, match="is not running"):
        a.run(["true"])
    a.kill()
    assert b.alive and b.sh("echo still").strip() == "still"
    with pytest.raises(ConflictError):
        cluster.start("a")


def test_full_file_system_of_a_size_that_was_asked_for(cluster: Cluster) -> None:
    small = cluster.start("small", scratch_mib=8, tmp_mib=4)
    for path in ("/tmp/big", "/var/big", "/srv/big"):
        result = small.run(["dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=16"], check=False)
        assert b"No space left on device" in result.stderr


def test_storage_on_disk_is_removed(cluster: Cluster) -> None:
    node = cluster.start("disk", disk=True)
    node.write("/srv/file", "x")
    storage = host.DISKS / cluster.id
    assert (storage / "disk/plain/srv/file").read_text() == "x"
    cluster.close()
    assert not storage.exists()


def test_registry_answers_on_every_node(cluster: Cluster, registry: str) -> None:
    url = f"http://{registry}/v2/"
    code = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).status)"
    assert cluster.start("client").run(["python3", "-c", code, url]).stdout == b"200\n"


def test_leftovers_reports_what_lives(cluster: Cluster) -> None:
    cluster.start("node")
    found = host.leftovers(cluster.id)
    assert any(f.startswith("cgroup ") for f in found)
    assert any("node-init" in f or "init.py" in f for f in found)


HARNESS = """
import sys, time
from tests.nodes.cluster import Cluster
with Cluster(tag="dies") as cluster:
    node = cluster.start("a", disk=True)
    p = node.popen(["sleep", "600"])
    node.sh("setsid sleep 601 >/dev/null 2>&1 </dev/null &")
    print(cluster.id, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_is_left_when_the_harness_dies(how: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree.REPO)}
    process = subprocess.Popen(
        [sys.executable, "-c", HARNESS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    with process.stdout:
        name = process.stdout.readline().decode().strip()
        assert name.startswith(host.PREFIX)
        assert host.leftovers(name), "the cluster should be there while its process is"
        process.send_signal(how)
        process.wait(20)
    end = time.monotonic() + 10
    # A directory on disk is all that may wait for the next start's sweep, when nothing could run on exit.
    while left := [x for x in host.leftovers(name) if not x.startswith("directory ")]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
    host.sweep()
    assert host.leftovers(name) == []


def test_sweep_removes_the_cgroup_of_a_dead_harness() -> None:
    stale = host.cgroup2() / f"{host.PREFIX}stale.{2**22 + 1}.1.0"  # no such pid can be
    (stale / "node" / "init").mkdir(parents=True)
    sleeper = subprocess.Popen(["sleep", "600"])
    (stale / "node" / "init" / "cgroup.procs").write_text(str(sleeper.pid))
    assert any(stale.name in x for x in host.leftovers())
    host.sweep()
    assert sleeper.wait(5) == -signal.SIGKILL
    assert not stale.exists() and not any(stale.name in x for x in host.leftovers())
