# SPDX-License-Identifier: Apache-2.0
"""CRIU is killed at random early moments: the runtime never hangs, and the container and the node are as before."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.crash import LOOK, Points, processes, serving
from tests.node.test_memory import RESTING, Mosaic
from tests.node.tracer import about_to_write
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

OUT, SAVED = "/srv/out", "/srv/saved"
KILLS = 12
SECONDS = 30.0  # an operation that has not ended then hangs


class Killer(threading.Thread):
    """Kills the CRIU number `which` of those that a runtime starts, `delay` seconds after it is there.

    A runtime asks the first for its version. With a `log`, one that has got to a process of the container is let be:
    docs/crash-matrix.md says what that can do.
    """

    def __init__(self, node: NamespaceNode, which: int, delay: float, log: Path | None) -> None:
        super().__init__(daemon=True)
        self.node, self.which, self.delay, self.log = node, which, delay, log
        self.before = processes()
        self.done = threading.Event()
        self.struck = False

    def run(self) -> None:
        seen: set[int] = set()
        while not self.done.is_set() and len(seen) < self.which:
            time.sleep(LOOK)
            for pid in serving(self.node.pid, self.before):
                with contextlib.suppress(OSError):
                    if b"swrk" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid not in seen:
                        seen.add(pid)
                        if len(seen) == self.which:
                            self._strike(pid)

    def _strike(self, pid: int) -> None:
        time.sleep(self.delay)
        if self.log is not None and self.log.exists() and b"Seized task" in self.log.read_bytes():
            return
        os.kill(pid, signal.SIGKILL)
        self.struck = True


@pytest.fixture(scope="module")
def node() -> Iterator[NamespaceNode]:
    with Cluster(tag="killed") as cluster:
        yield cluster.start("a")


@pytest.fixture(params=["runc", "crun"])
def mosaic(node: NamespaceNode, request: pytest.FixtureRequest) -> Iterator[Mosaic]:
    with Mosaic(node, request.param, 4, mib=8, pace=RESTING) as made:
        yield made


def struck(node: NamespaceNode, argv: list[str], chance: random.Random, log: Path | None = None) -> bool:
    """Run a command whose CRIU is killed early, or not at all if it was quicker; returns whether it failed."""
    killer = Killer(
        node, chance.choice([1, 2, 2, 2]), chance.choice([0.0, 0.005, 0.02, 0.1]) * chance.random(), log
    )
    killer.start()
    with node.path("/srv/said").open("wb") as said:  # a pipe would be the container's, too
        process = node.popen(argv, stdout=said, stderr=said)
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(node.sh("ps axo pid,ppid,stat,wchan:20,args")) from None
        finally:
            killer.done.set()
            process.kill()
    killer.join()
    assert killer.struck or status == 0, node.read("/srv/said")
    assert node.run(["pgrep", "-af", "^criu|launcher.py"], check=False).stdout == b""
    return status != 0


def state(mosaic: Mosaic) -> str:
    return mosaic.node.run([mosaic.kind, "state", mosaic.name], check=False).stdout.decode()


@pytest.mark.parametrize("by", ["cryoci", "cryoci-runtime"])
def test_in_a_dump(node: NamespaceNode, mosaic: Mosaic, by: str) -> None:
    chance = random.Random(f"{mosaic.kind} {by}")
    argv = {
        "cryoci": ["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-R", "-o", OUT],
        "cryoci-runtime": ["cryoci-runtime", "checkpoint", "--leave-running", "--image-path", f"{OUT}/i",
                           "--work-path", OUT, mosaic.name],
    }[by]  # fmt: skip
    failed = 0
    for _ in range(KILLS):
        node.run(["rm", "-rf", OUT])
        if struck(node, argv, chance, node.path(f"{OUT}/dump.log")):
            failed += 1
            assert not node.path(f"{OUT}/i/inventory.img").exists()
            assert by == "cryoci-runtime" or not node.path(OUT).exists()
        assert mosaic.journal() is None
        assert '"running"' in state(mosaic), state(mosaic)
        mosaic.must_be_as_before()
    assert failed > 0


def test_in_a_restore(node: NamespaceNode, mosaic: Mosaic) -> None:
    chance = random.Random(mosaic.kind)
    node.run(["rm", "-rf", SAVED])
    node.run(["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-o", SAVED])
    asked, before = mosaic.asked, mosaic.before
    sums = node.sh(f"find {SAVED} -type f | sort | xargs sha256sum")
    argv = ["cryoci", "restore", SAVED, "--detach", "--bundle", mosaic.base]
    failed = 0
    for _ in range(KILLS):
        node.sh(f"rm -f {mosaic.base}/rootfs/data/*")
        if struck(node, argv, chance):
            failed += 1
            assert state(mosaic) == "" and mosaic.name not in node.sh(f"{mosaic.kind} list -q")
            assert not node.path(f"/sys/fs/cgroup/{mosaic.name}").exists()
            assert node.run(["pgrep", "-f", "/app/mosaic.py"], check=False).stdout == b""
            assert node.sh(f"find {SAVED} -type f | sort | xargs sha256sum") == sums
            workload.detach(node, argv, f"{mosaic.base}/log")
        mosaic.asked, mosaic.before = asked, before
        mosaic.must_be_as_before()
        node.run(["cryoci-runtime", "delete", "-f", mosaic.name])
    assert failed > 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="tests/node/tracer.py reads registers of x86-64")
@pytest.mark.parametrize("who", ["worker", pytest.param("first", marks=pytest.mark.more)])
def test_a_process_dies_under_crius_hands(node: NamespaceNode, mosaic: Mosaic, who: str) -> None:
    """CRIU waits for a process that dies, as at a memory limit. It does not wait for ever, and the others run on."""
    first = int(json.loads(state(mosaic))["pid"])
    victim = first if who == "first" else int(node.sh(f"pgrep -P {first}"))
    home = node.sh(f"sed -n s/^0:://p /proc/{first}/cgroup").strip()
    freezer = node.path(f"/sys/fs/cgroup{home}/cgroup.freeze")
    node.run(["rm", "-rf", OUT])
    argv = ["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-R", "-o", OUT]
    halted = Points(node).halt(argv, "seizing", f"{OUT}/dump.log")
    with about_to_write(halted.criu, b"Parasite syscall_ip", 1 if who == "first" else 2):
        freezer.write_text("1")  # so that what CRIU has it do next is not done
    time.sleep(0.3)
    node.run(["kill", "-KILL", str(victim)])
    freezer.write_text("0")
    began = time.monotonic()
    said = halted.end()
    assert time.monotonic() - began < 20
    assert halted.process.returncode == 1
    assert f"process {victim} of the container ended while CRIU was in it" in said, said
    assert mosaic.journal() is None
    assert not node.path(f"{OUT}/checkpoint/inventory.img").exists()
    if who == "worker":
        assert '"running"' in state(mosaic)
        counts = [mosaic.tell("parent")["parent"]["counts"] for _ in range(2)]
        assert counts[0] < counts[1]
