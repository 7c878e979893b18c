# SPDX-License-Identifier: Apache-2.0
"""Memory out of band, over the real runc, crun and CRIU: nothing is lost and nothing runs without its memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode
from tests.nodes.node import Node

pytestmark = pytest.mark.node

CONFIG = "/etc/cryoci/config.toml"
MOSAIC = Path(__file__).with_name("mosaic.py")
ANSWERS = MOSAIC.with_name("answers.py")
# Runs the runtime and kills it, as kill -9 does, at the place named by its first word.
KILLER = """
import os, signal, sys
sys.path.insert(0, "/opt/cryoci/lib/python3.13/site-packages")
from cryoci.shim import dispatch
from cryoci.shim.memory import dump, fill, freezer, inject, journal, repair, verbs

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

place = sys.argv.pop(1)
write = journal.Journal.write
def writes(self, record):
    write(self, record)
    if self.state == place:
        die()
if place in ("captured", "dropping", "restoring", "filled"):
    journal.Journal.write = writes
elif place == "stopped":
    freezer.await_stopped = die
elif place == "injecting":
    inject._put_back = die
elif place == "dropped":
    take_out = dump.take_out
    dump.take_out = lambda *a: (take_out(*a), die())
elif place == "dumped":
    dump.conclude = die
elif place == "filling":
    fill_ = fill.fill
    fill.fill = lambda *a: (fill_(*a), die())
elif place == "half":
    inject_drop = inject.drop
    def drop(pid, areas, save):
        inject_drop(pid, areas[: len(areas) // 2], save)
        die()
    inject.drop = drop
dispatch.main(sys.argv, "/usr/local/bin/cryoci-runtime")
"""

# Runs the runtime, and prints what its meter says last.
METER = """
import sys
sys.path.insert(0, "/opt/cryoci/lib/python3.13/site-packages")
from cryoci.shim import dispatch
from cryoci.shim.memory import meter

left = meter.Meter.__exit__
def leaves(self, *exc):
    sys.stderr.write(open(self._path).read())
    left(self, *exc)
meter.Meter.__exit__ = leaves
dispatch.main(sys.argv, "/usr/local/bin/cryoci-runtime")
"""


@pytest.fixture(scope="module")
def node() -> Iterator[NamespaceNode]:
    """One node for all tests of this module; each test uses containers of its own."""
    with Cluster(tag="memory") as cluster:
        made = cluster.start("a")
        made.write("/srv/killer.py", KILLER)
        yield made


# How mosaic's threads count (its Twins). Busy ones take a processor, resting ones a tenth of it, and see a millisecond
# between two captures all the same.
BUSY, RESTING = (200, 500), (5, 1000)


class Mosaic:
    """A container of mosaic.py, with nothing left of it after the with block."""

    program = MOSAIC

    def __init__(
        self,
        node: Node,
        kind: str,
        seed: int,
        *,
        mib: int = 60,
        counting: int = 4,
        waiting: int = 2,
        pace: tuple[int, int] = BUSY,
        seccomp: Any = None,
    ) -> None:
        self.node, self.kind, self.name = node, kind, f"mosaic-{kind}-{seed}"
        self.base, self.asked = f"/srv/{self.name}", 0
        numbers = (seed, mib, counting, waiting, *pace)
        self.words = ("python3", "-u", "/app/mosaic.py", *map(str, numbers))
        self.seccomp = seccomp
        self.before: dict[str, Any] = {}

    def __enter__(self) -> Mosaic:
        configure(self.node, self.kind)
        spec = workload.bundle(self.node, self.base)
        self.node.write(f"{self.base}/rootfs/app/mosaic.py", self.program.read_text())
        self.node.write(f"{self.base}/rootfs/app/{ANSWERS.name}", ANSWERS.read_text())
        spec["process"]["args"] = list(self.words)
        if self.seccomp:
            spec["linux"]["seccomp"] = self.seccomp
        self.node.write(f"{self.base}/config.json", json.dumps(spec))
        argv = ["cryoci-runtime", "run", "-d", "-b", self.base, self.name]
        workload.detach(self.node, argv, f"{self.base}/log")
        self.before = self.tell()
        return self

    def __exit__(self, *exc: object) -> None:
        self.node.run(["cryoci-runtime", "delete", "-f", self.name], check=False)
        self.node.run(["rm", "-rf", self.base])

    @property
    def images(self) -> str:
        return f"{self.base}/img"

    def checkpoint(self, *words: str) -> None:
        argv = ["cryoci-runtime", "checkpoint", "--image-path", self.images, *words, self.name]
        self.node.run(argv)

    def delete(self) -> None:
        """runc's checkpoint has done so already, crun's has not."""
        self.node.run(["cryoci-runtime", "delete", self.name], check=False)

    def restore(self, *before: str, images: str = "") -> None:
        argv = [*(before or ["cryoci-runtime"]), "restore", "-d", "-b", self.base]
        workload.detach(
            self.node, [*argv, "--image-path", images or self.images, self.name], f"{self.base}/log"
        )

    def tell(self, *who: str) -> dict[str, Any]:
        """What its processes say of their memory."""
        data = f"{self.base}/rootfs/data"
        self.node.sh(f"touch {data}/ask.{self.asked}")
        end = time.monotonic() + 60
        both = [f"{data}/{one}.{self.asked}" for one in who or ("parent", "child")]
        while len(self.node.sh(f"ls {' '.join(both)} 2>/dev/null || true").split()) < len(both):
            if time.monotonic() > end:
                raise AssertionError(
                    "mosaic does not answer:\n" + self.node.sh("ps axo pid,stat,wchan,args")
                )
            time.sleep(0.02)
        self.asked += 1
        return {path.rpartition("/")[2].split(".")[0]: json.loads(self.node.read(path)) for path in both}

    def must_be_as_before(self) -> None:
        """All of its memory is as it was, and its counters have gone on from where they were."""
        now = self.tell()
        for who, told in self.before.items():
            assert now[who]["digest"] == told["digest"], who
            assert now[who]["wrong"] == 0
            assert all(a > b for a, b in zip(now[who]["counts"], told["counts"], strict=True))
            assert now[who]["threads"] == told["threads"]
        self.before = now

    def journal(self) -> dict[str, Any] | None:
        raw = self.node.sh(f"cat /run/cryoci/containers/default/{self.name}/memory.json 2>/dev/null || true")
        found: dict[str, Any] | None = json.loads(raw) if raw else None
        return found

    def moved(self) -> list[str]:
        """Names of the chunk files in its images."""
        return self.node.sh(f"cd {self.images} && ls | grep cryoci-memory- || true").split()


class Pair(Mosaic):
    """A container of pair.py."""

    program = Path(__file__).with_name("pair.py")


def configure(node: Node, kind: str, engine: str = "parallel", *more: str) -> None:
    digest = {"runc": "sha256", "crun": "xxh3"}[kind]  # one each
    lines = (
        f'path = "{kind}"',
        "[memory]",
        f'engine = "{engine}"',
        'threshold = "1M"',
        'chunk = "4M"',
        f'digest = "{digest}"',
        *more,
    )
    node.write(CONFIG, "\n".join(["[runtime]", *lines]) + "\n")


@pytest.mark.parametrize("kind", ["runc", "crun"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_byte_is_there_again_and_nothing_ran_without(
    node: NamespaceNode, kind: str, seed: int
) -> None:
    with Mosaic(node, kind, seed) as mosaic:
        mosaic.checkpoint("--leave-running")
        assert len(mosaic.moved()) >= 4
        mosaic.must_be_as_before()
        node.sh(f"rm -r {mosaic.images}")
        mosaic.checkpoint()
        mosaic.delete()
        mosaic.restore()
        mosaic.must_be_as_before()
        assert mosaic.journal() is None
        assert not node.sh(f"ls /run/cryoci/containers/default/{mosaic.name} | grep images || true")


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_a_hundred_threads_in_system_calls_and_direct_writes(node: NamespaceNode, kind: str) -> None:
    with Mosaic(node, kind, 12, mib=30, waiting=96) as mosaic:
        assert mosaic.before["parent"]["threads"] == 101
        configure(node, kind, "criu")
        node.write("/srv/meter.py", METER)
        argv = ["/opt/cryoci/bin/python", "/srv/meter.py", "checkpoint", "--image-path", mosaic.images]
        options = "engine=parallel,write=direct,threads=3"
        seen = node.run([*argv, f"--memory-options={options}", mosaic.name]).stderr.decode().splitlines()
        phase, done, total, _ = seen[-1].split()
        assert phase == "capture" and 0 < int(done) <= int(total)
        chosen = json.loads(node.read(f"/run/cryoci/containers/default/{mosaic.name}/memory-placement.json"))
        assert chosen["capture"]["chosen"]["write"] in (
            "direct",
            "buffered",
        )  # by the file system below /srv
        mosaic.delete()
        mosaic.restore()
        mosaic.must_be_as_before()


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_an_area_that_only_the_child_has_out_of_band(node: NamespaceNode, kind: str) -> None:
    with Pair(node, kind, 13) as pair:
        pair.checkpoint()
        pair.delete()
        pair.restore()
        pair.must_be_as_before()


def test_a_frozen_container_stays_frozen_and_seccomp_is_no_obstacle(node: NamespaceNode) -> None:
    denied = [{"names": ["madvise", "ptrace"], "action": "SCMP_ACT_ERRNO"}]
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": denied}
    with Mosaic(node, "runc", 3, seccomp=seccomp) as mosaic:
        node.run(["cryoci-runtime", "pause", mosaic.name])
        mosaic.checkpoint("--leave-running")
        state = json.loads(node.run(["cryoci-runtime", "state", mosaic.name]).stdout)
        assert state["status"] == "paused"
        node.run(["cryoci-runtime", "resume", mosaic.name])
        mosaic.must_be_as_before()


PLACES = ["captured", "stopped", "dropping", "injecting", "half", "dropped", "dumped", "filling", "filled"]


def test_kill_9_at_every_state_of_a_checkpoint_loses_nothing(node: NamespaceNode) -> None:
    with Mosaic(node, "runc", 4, mib=40) as mosaic:
        for place in PLACES:
            argv = ["checkpoint", "--leave-running", "--image-path", mosaic.images, mosaic.name]
            killed = node.run(["/opt/cryoci/bin/python", "/srv/killer.py", place, *argv], check=False)
            assert killed.returncode in (-9, 137), (place, killed.stderr)
            assert mosaic.journal() is not None, place
            if place != "filled":
                again = node.run(["cryoci-runtime", *argv], check=False)
                assert b"cryoci repair" in again.stderr, (place, again.stderr)
            node.run(["cryoci", "repair", mosaic.name])
            assert mosaic.journal() is None, place
            mosaic.must_be_as_before()
            node.sh(f"rm -rf {mosaic.images}")
        mosaic.checkpoint()  # and it still can be checkpointed
        mosaic.delete()
        mosaic.restore()
        mosaic.must_be_as_before()


@pytest.mark.parametrize("place", ["restoring", "filling", "filled"])
def test_kill_9_of_a_restore_is_repaired(node: NamespaceNode, place: str) -> None:
    with Mosaic(node, "runc", 5, mib=30) as mosaic:
        mosaic.checkpoint()
        mosaic.delete()
        with pytest.raises(AssertionError):
            mosaic.restore("/opt/cryoci/bin/python", "/srv/killer.py", place)
        node.run(["cryoci", "repair", mosaic.name])
        mosaic.must_be_as_before()


def test_a_failed_dump_gives_the_memory_back(node: NamespaceNode) -> None:
    with Mosaic(node, "crun", 6, mib=30) as mosaic:
        node.sh(f"mkdir -p {mosaic.images}/core-1.img")  # CRIU cannot write its image there
        argv = ["cryoci-runtime", "checkpoint", "--image-path", mosaic.images, mosaic.name]
        failed = node.run(argv, check=False)
        assert failed.returncode != 0
        assert mosaic.journal() is None
        assert mosaic.moved() == []
        mosaic.must_be_as_before()


def test_a_directory_that_is_too_small_changes_nothing(node: NamespaceNode) -> None:
    with Mosaic(node, "runc", 9, mib=30) as mosaic:
        node.sh(f"mkdir {mosaic.images}; mount -t tmpfs -o size=5m tmpfs {mosaic.images}")
        try:
            argv = ["cryoci-runtime", "checkpoint", "--image-path", mosaic.images, mosaic.name]
            failed = node.run(argv, check=False)
            assert failed.returncode != 0
            assert b"MiB free" in failed.stderr
            assert mosaic.journal() is None
        finally:
            node.sh(f"umount {mosaic.images}")
        mosaic.must_be_as_before()


def test_a_damaged_chunk_never_runs_and_leaves_nothing(node: NamespaceNode) -> None:
    with Mosaic(node, "runc", 7, mib=30) as mosaic:
        mosaic.checkpoint()
        mosaic.delete()
        chunk = f"{mosaic.images}/{mosaic.moved()[0]}"
        size = int(node.sh(f"stat -c %s {chunk}"))
        node.sh(
            f"cp {chunk} /srv/whole; printf x | dd of={chunk} bs=1 seek={size - 100} conv=notrunc status=none"
        )
        with pytest.raises(AssertionError, match="its digest is another"):
            mosaic.restore()
        node.sh(f"truncate -s -4096 {chunk}")
        with pytest.raises(AssertionError, match="cut off"):
            mosaic.restore()
        assert node.run(["runc", "state", mosaic.name], check=False).returncode != 0
        assert mosaic.name not in node.sh("ps axo args")
        node.sh(f"mv /srv/whole {chunk}")
        mosaic.restore()
        mosaic.must_be_as_before()


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_a_plain_restore_fails_and_says_why_until_it_is_materialized(node: NamespaceNode, kind: str) -> None:
    with Mosaic(node, kind, 8) as mosaic:
        mosaic.checkpoint()
        mosaic.delete()
        with pytest.raises(AssertionError):
            mosaic.restore(kind)
        assert "files.img" in node.sh(f"grep Error {mosaic.images}/restore.log")
        assert b"cryoci materialize" in node.read(f"{mosaic.images}/files.img")
        # where CRIU has a directory of plugins it names the reason itself
        node.run([kind, "delete", "-f", mosaic.name], check=False)
        node.sh("mkdir -p /usr/lib/criu")
        with pytest.raises(AssertionError):
            mosaic.restore(kind)
        assert "Missing required plugin: memory of cryoci" in node.sh(
            f"grep Error {mosaic.images}/restore.log"
        )
        node.run([kind, "delete", "-f", mosaic.name], check=False)
        node.run(["cryoci", "materialize", mosaic.images])
        assert mosaic.moved() == []
        mosaic.restore(kind)
        mosaic.must_be_as_before()
        node.run([kind, "delete", "-f", mosaic.name])
        node.sh("rmdir /usr/lib/criu")


def test_a_container_that_dies_meanwhile_leaves_no_journal(node: NamespaceNode) -> None:
    with Mosaic(node, "runc", 11, mib=30) as mosaic:
        node.write("/srv/dies/criu", "#!/bin/sh\npkill -9 -f mosaic.py; sleep 0.1; exit 1\n", mode=0o755)
        argv = ["cryoci-runtime", "checkpoint", "--image-path", mosaic.images, mosaic.name]
        assert node.run(argv, check=False, env={"PATH": "/srv/dies:/usr/sbin:/usr/bin"}).returncode != 0
        assert mosaic.journal() is None
        assert mosaic.moved() == []
