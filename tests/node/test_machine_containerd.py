# SPDX-License-Identifier: Apache-2.0
"""containerd at its defaults, and engines' commands side by side, with every cgroup v2 controller.

In a file of its own, as each file has its machine, and two machines run at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.node import commands
from tests.node.subject import CONFIG, runs_on
from tests.nodes import workload
from tests.nodes.machine import Machine

pytestmark = [pytest.mark.machine, pytest.mark.timeout(600)]

SHIM = "/usr/local/bin/cryoci-runtime"


@pytest.fixture(scope="module")
def containerd(machine: Machine) -> Iterator[Machine]:
    """The machine with containerd at its defaults, and the counter in it."""
    machine.sh("setsid containerd >/var/log/containerd.log 2>&1 </dev/null &")
    machine.sh("for i in $(seq 100); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1")
    machine.run(["ctr", "image", "import", workload.ARCHIVE], timeout=120)
    yield machine
    machine.sh("pkill -x containerd || true")


@pytest.mark.parametrize(("below", "program"), [("runc", "/usr/sbin/runc"), ("crun", "/usr/bin/crun")])
def test_commands_side_by_side(containerd: Machine, below: str, program: str) -> None:
    """48 commands over runc and over crun, with limits and engines' defaults (78 over each in namespace nodes)."""
    node = containerd
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')

    def side(runtime: str, binary: str, port: int) -> list[commands.Answer]:
        name = f"side{port}"
        lines = [*commands.podman_limits(name), *commands.podman_verbs(name, port)]
        lines += commands.containerd(name, binary)
        lines = [line.replace("podman ", f"podman --runtime={runtime} ") for line in lines]
        return commands.answers(node, lines, name, str(port), f"--runtime={runtime} ", binary)

    with ThreadPoolExecutor(2) as pool:
        bare = pool.submit(side, below, program, 8091)
        ours = pool.submit(side, "cryoci-runtime", SHIM, 8092)
    for theirs, mine in zip(bare.result(), ours.result(), strict=True):
        assert mine == theirs
    assert len(bare.result()) == 48
    limits = bare.result()[2]
    assert (limits.status, limits.out) == (7, f"{64 << 20}\n50\n50000 100000\n")
    assert bare.result()[15].status == 137  # beyond its memory
    node.run(["rm", "-f", CONFIG])


@pytest.mark.parametrize(
    ("binary", "below"), [("runc", "runc"), (SHIM, "crun")], ids=["runc", "cryoci-runtime over crun"]
)
def test_containerd(containerd: Machine, binary: str, below: str) -> None:
    """containerd's own checkpoint and restore; over crun they fail but for cryoci-runtime.

    containerd names a CRIU work directory that it does not make, and flags that crun does not have.
    """
    node = containerd
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    name = f"ctr-{below}-{'shim' if binary == SHIM else 'plain'}"
    image = f"localhost/checkpoint-{name}:1"
    argv = ["ctr", "run", "--detach", "--net-host", "--runc-binary", binary, workload.IMAGE, name]
    node.run([*argv, *workload.COMMAND, "--memory-mib=4"], timeout=120)
    before = workload.wait(node, 3, timeout=60)
    node.run(["ctr", "container", "checkpoint", "--image", "--task", "--rw", name, image], timeout=120)
    runs_on(before, workload.wait(node, before["count"] + 3, timeout=60))
    if binary == SHIM:
        log = node.sh(f"cat $(find /run/cryoci -path '*{name}/dump.log')")
        assert "Dumping finished successfully" in log
    node.run(["ctr", "task", "kill", "--signal=KILL", name])
    node.sh(f"while ctr task ls | grep '^{name} ' | grep -q RUNNING; do sleep 0.1; done")
    node.run(["ctr", "task", "rm", name], check=False)
    node.run(["ctr", "container", "rm", name])
    copy = f"{name}-copy"
    node.run(["ctr", "container", "restore", "--rw", "--live", copy, image], timeout=120)
    runs_on(before, workload.wait(node, before["count"] + 3, timeout=60))
    pids = node.sh(f"ctr task ps {copy} | tail -n +2 | cut -d' ' -f1").split()
    assert len(pids) == 2  # both are in the container's cgroup, by which containerd counts
    node.run(["ctr", "task", "kill", "--signal=KILL", copy])
    node.sh(f"while ctr task ls | grep '^{copy} ' | grep -q RUNNING; do sleep 0.1; done")
    node.run(["ctr", "task", "rm", copy], check=False)
    node.run(["ctr", "container", "rm", copy])
    node.run(["rm", "-f", CONFIG])
