# SPDX-License-Identifier: Apache-2.0
"""podman at its defaults, with every cgroup v2 controller, on a kernel of its own; and cgroup v1."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.node.subject import CONFIG, KINDS, Kind, Subject, runs_on
from tests.node.test_memory import Pair
from tests.nodes import workload
from tests.nodes.machine import Machine

pytestmark = [pytest.mark.machine, pytest.mark.timeout(600)]


@pytest.mark.parametrize("kind", [KINDS["podman+runc"], KINDS["podman+crun"]], ids=["runc", "crun"])
def test_podman_at_its_defaults(machine: Machine, kind: Kind) -> None:
    """Limits are in force before and after, and no process is outside of its container's cgroup."""
    node = machine
    node.write(CONFIG, f'[runtime]\npath = "{kind.below}"\n')
    subject = Subject(node, kind, f"p-{kind.below}", workload.IMAGE)
    before = subject.start(options=("--memory=256m",))
    limits = _limits(subject)
    assert limits["memory.max"] == str(256 << 20) and limits["pids.max"].isdigit()
    subject.checkpoint(f"{subject.name}:1", "--compression=none")
    assert subject.status == "exited"
    subject.remove()
    subject.restore(f"{subject.name}:1")
    runs_on(before, subject.wait(before["count"] + 3))
    assert _limits(subject) == limits
    assert len(subject.cgroups) == 1 and subject.id in subject.cgroups.pop()
    subject.remove()
    node.run(["rm", "-f", CONFIG])


def _limits(subject: Subject) -> dict[str, str]:
    (group,) = {line.strip() for line in subject.cgroups}
    return {
        name: subject.node.read(f"/sys/fs/cgroup{group}/{name}").decode().strip()
        for name in ("memory.max", "pids.max")
    }


def test_pre_checkpoint(machine: Machine) -> None:
    """Where the kernel tracks memory: podman dumps it first, and then only what has changed."""
    node = machine
    podman = ["podman", "--runtime=cryoci-runtime"]
    subject = Subject(node, KINDS["podman+cryoci-runtime"], "pre", workload.IMAGE)
    before = subject.start()
    first, second = "/srv/first.tar", "/srv/second.tar"
    checkpoint = [*podman, "container", "checkpoint", "--compress=none"]
    node.run([*checkpoint, "--pre-checkpoint", f"--export={first}", subject.name])
    assert subject.status == "running"
    node.run([*checkpoint, "--with-previous", f"--export={second}", subject.name])
    sizes = [
        int(node.sh(f"tar -xOf {name} --wildcards '*/pages-*.img' | wc -c")) for name in (first, second)
    ]
    assert sizes[1] < sizes[0] / 2
    subject.remove()
    node.run([*podman, "container", "restore", f"--import-previous={first}", f"--import={second}"])
    runs_on(before, subject.wait(before["count"] + 3))
    subject.remove()


# Pages all private anonymous memory of the processes named by its words out.
_PAGEOUT = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
for pid in map(int, sys.argv[1:]):
    fd = os.pidfd_open(pid)
    for line in open(f"/proc/{pid}/maps"):
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if " rw-p 00000000 00:00 0" in line:
            libc.syscall(440, fd, struct.pack("2Q", start, end - start), 1, 21, 0)
"""


def test_memory_that_was_swapped_out(machine: Machine) -> None:
    """Out of band, most of it in a swap file: captured, dropped and filled as any other.

    The kernel gives huge pages here unasked, so that the restored child shares the rest of one with its parent.
    """
    node = machine
    assert "[always]" in node.sh("cat /sys/kernel/mm/transparent_hugepage/enabled")
    node.sh(
        "dd if=/dev/zero of=/srv/swap bs=1M count=128 status=none; chmod 600 /srv/swap; mkswap -q /srv/swap"
    )
    node.sh("swapon /srv/swap")
    node.write("/srv/pageout.py", _PAGEOUT)
    try:
        with Pair(node, "runc", 31) as pair:
            for words in (("--leave-running",), ()):
                pids = node.sh("pgrep -f '^python3 -u /app/mosaic'").split()
                node.run(["python3", "/srv/pageout.py", *pids])
                swapped = node.sh(f"cat {' '.join(f'/proc/{pid}/status' for pid in pids)} | grep VmSwap")
                assert sum(int(line.split()[1]) for line in swapped.splitlines()) > 8 << 10, swapped
                pair.checkpoint(*words)
                assert pair.moved()
                if not words:
                    pair.delete()
                    pair.restore()
                pair.must_be_as_before()
                node.sh(f"rm -rf {pair.images}")
    finally:
        node.sh("swapoff /srv/swap; rm -f /srv/swap /etc/cryoci/config.toml")


# A controller that v2 has let go is free a moment later.
_HYBRID = """
    cd /sys/fs/cgroup; find . -mindepth 1 -depth -type d ! -path './init*' -exec rmdir {} +; cd /
    for one in $(cat /sys/fs/cgroup/cgroup.subtree_control); do echo -$one >/sys/fs/cgroup/cgroup.subtree_control; done
    mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup && cd /sys/fs/cgroup
    mkdir unified && mount -t cgroup2 cgroup2 unified
    for one in pids freezer cpu,cpuacct devices; do
        mkdir $one
        for try in $(seq 50); do mount -t cgroup -o $one cgroup $one 2>/dev/null && break; sleep 0.1; done
        mountpoint -q $one
    done
    mkdir systemd && mount -t cgroup -o none,name=systemd cgroup systemd
"""


def _hybrid(node: Machine) -> None:
    node.sh(f"mountpoint -q /sys/fs/cgroup/unified || {{ {_HYBRID} }}")
    node.write(CONFIG, '[runtime]\npath = "runc"\n')


def _saved(node: Machine, name: str) -> tuple[Subject, dict[str, Any]]:
    """A bare container that may have 50 processes, ended by its checkpoint NAME:1, and what it said last."""
    subject = Subject(node, Kind("bare", "cryoci-runtime", "runc"), name)
    config = workload.bundle(node, subject.bundle, args=("--memory-mib=4",))
    config["linux"]["resources"] = {"pids": {"limit": 50}}
    node.write(f"{subject.bundle}/config.json", json.dumps(config))
    argv = ["cryoci-runtime", "run", "--detach", "--bundle", subject.bundle, subject.name]
    workload.detach(node, argv, subject.log)
    before = subject.wait(2)
    subject.checkpoint(f"{name}:1", "--compression=none")
    assert subject.status == "gone"
    return subject, before


def test_cgroup_v1_hybrid(machine: Machine) -> None:
    """As systemd lays it out with unified_cgroup_hierarchy=0; last, as the machine stays so.

    Debian's kernel 6.12 has no memory and cpuset controllers for v1 any more; what it has is in force after the
    restore too. crun says that it does not support a hybrid whose v2 has controllers, so there is nothing to restore.
    """
    node = machine
    _hybrid(node)
    checks = json.loads(node.run(["cryoci", "doctor", "--json"], check=False).stdout)["checks"]
    (seen,) = (check for check in checks if check["id"] == "kernel.cgroup")
    assert (seen["verdict"], seen["found"]) == ("warn", "hybrid v1 and v2")
    subject, before = _saved(node, "hybrid")
    subject.restore(f"{subject.name}:1", "--allow=host-namespaces")
    runs_on(before, subject.wait(before["count"] + 3))
    groups = "/sys/fs/cgroup/pids/hybrid"
    assert node.read(f"{groups}/pids.max") == b"50\n"
    inside = node.read(f"{groups}/cgroup.procs").decode().split()
    assert str(subject.pid) in inside and len(inside) == 2
    for verb, frozen in (("pause", "FROZEN"), ("resume", "THAWED")):
        node.run(["cryoci-runtime", verb, subject.name])
        state = node.sh("cat $(find /sys/fs/cgroup/freezer -path '*hybrid/freezer.state')")
        assert state.strip() == frozen
    subject.remove()


@pytest.mark.more
def test_annotated_create_on_a_hybrid(machine: Machine) -> None:
    """The new container's limit is in force, and nothing of it runs before its start."""
    node = machine
    _hybrid(node)
    subject, before = _saved(node, "copied")
    subject.remove()
    copy = subject.on(node, "copied2")
    config = workload.bundle(node, copy.bundle, annotations={"io.cryoci.restore": "copied:1"})
    config["linux"]["resources"] = {"pids": {"limit": 40}}
    node.write(f"{copy.bundle}/config.json", json.dumps(config))
    workload.detach(node, ["cryoci-runtime", "create", "--bundle", copy.bundle, copy.name], copy.log)
    assert copy.status == "created"
    counted = node.sh(f"stat -c %s {copy.bundle}/rootfs/data/count.log")
    time.sleep(1)
    assert node.sh(f"stat -c %s {copy.bundle}/rootfs/data/count.log") == counted
    node.run(["cryoci-runtime", "start", copy.name])
    runs_on(before, copy.wait(before["count"] + 3))
    assert node.read("/sys/fs/cgroup/pids/copied2/pids.max") == b"40\n"
    assert len(node.read("/sys/fs/cgroup/pids/copied2/cgroup.procs").split()) == 2
    copy.remove()
