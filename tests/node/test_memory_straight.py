# SPDX-License-Identifier: Apache-2.0
"""`cryoci checkpoint --straight`: memory goes into the registry or layout, and nothing of it onto the node's disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.node.crash import Points
from tests.node.test_memory import Mosaic, configure
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

SCRATCH = "/var/lib/cryoci/tmp"
REGISTRY = "docker-registry serve"


class Large(Mosaic):
    """A container of large.py."""

    program = Path(__file__).with_name("large.py")


@dataclass
class Place:
    """A node, and another one with a registry."""

    node: NamespaceNode
    other: NamespaceNode
    cluster: Cluster
    registry: str

    def reference(self, where: str, mosaic: Mosaic) -> str:
        known = {
            "registry": f"{self.registry}/straight/{mosaic.name}:1",
            "layout": f"oci:/srv/images:{mosaic.name}",
        }
        return known[where]

    def tags(self, where: str, mosaic: Mosaic) -> list[str]:
        """The names in the repository or layout."""
        if where == "layout":
            index = json.loads(self.node.read("/srv/images/index.json"))
            return [m["annotations"]["org.opencontainers.image.ref.name"] for m in index["manifests"]]
        code = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
        url = f"http://{self.registry}/v2/straight/{mosaic.name}/tags/list"
        asked = self.node.run(["python3", "-c", code, url], check=False)
        return list(json.loads(asked.stdout)["tags"] or ()) if asked.returncode == 0 else []

    def stop_registry(self) -> None:
        self.other.run(["pkill", "-f", REGISTRY])

    def start_registry(self) -> None:
        assert self.cluster.registry(self.other) == self.registry


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Cluster(tag="straight") as cluster:
        node, other = cluster.start("a"), cluster.start("c")
        yield Place(node, other, cluster, cluster.registry(other))


def checkpoint(mosaic: Mosaic, reference: str, *words: str) -> list[str]:
    return ["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "--straight", "-o", reference, *words]


def restore(mosaic: Mosaic, reference: str) -> None:
    mosaic.node.run(["cryoci-runtime", "delete", "-f", mosaic.name], check=False)
    argv = ["cryoci", "restore", reference, "--detach", "--bundle", mosaic.base]
    workload.detach(mosaic.node, argv, f"{mosaic.base}/log")


@pytest.mark.parametrize("kind", ["runc", "crun"])
@pytest.mark.parametrize("where", ["registry", "layout"])
def test_runs_on_and_is_restored_with_no_room_for_a_copy(place: Place, kind: str, where: str) -> None:
    node = place.node
    with Large(node, kind, 21, mib=100) as mosaic:
        configure(node, kind, "criu")  # --straight turns it on
        reference = place.reference(where, mosaic)
        node.sh(f"mkdir -p {SCRATCH}; mount -t tmpfs -o size=40m tmpfs {SCRATCH}")
        try:
            refused = node.run([*checkpoint(mosaic, reference)[:-4], "-o", reference], check=False)
            assert b"MiB free" in refused.stderr  # a copy has no room there
            node.run(checkpoint(mosaic, reference, "-R"))
            mosaic.must_be_as_before()
            asked, before = mosaic.asked, mosaic.before
            report = json.loads(node.run(checkpoint(mosaic, reference, "--json")).stdout)
        finally:
            node.sh(f"umount {SCRATCH}")
        assert report["warnings"] == []
        assert report["image"]["raw_size"] > 200 << 20
        assert [tag for tag in place.tags(where, mosaic) if "cryoci-memory" in tag] == []
        assert mosaic.journal() is None
        node.sh(f"rm -f {mosaic.base}/rootfs/data/*")
        restore(mosaic, reference)
        mosaic.asked, mosaic.before = asked, before
        mosaic.must_be_as_before()


# who is killed where, and whether `cryoci repair` has something to do then
KILLS = [
    ("indexing", "cryoci", True),
    ("captured", "cryoci", True),
    ("dropping", "runtime", False),
    ("dropped", "cryoci", True),
    ("dropped", "runtime", False),
    ("dumped", "cryoci", True),
    ("dumped", "runtime", False),
    ("held", "cryoci", True),
    ("filling", "cryoci", True),
    ("ending", "cryoci", True),
]
WHO = {"cryoci": "bin/cryoci checkpoint ", "runtime": "launcher.py checkpoint "}


@pytest.fixture(scope="module")
def points(place: Place) -> Points:
    return Points(place.node)


@pytest.mark.parametrize("where", ["registry", "layout"])
def test_kill_9_at_every_state_loses_nothing(place: Place, points: Points, where: str) -> None:
    node = place.node
    with Mosaic(node, "runc", 22, mib=20) as mosaic:
        reference = place.reference(where, mosaic)
        for point, who, left in KILLS:
            argv = checkpoint(mosaic, reference, *(["-R"] if point != "ending" else []))
            halted = points.halt(argv, point)
            halted.kill(int(node.run(["pgrep", "-o", "-f", WHO[who]]).stdout))
            said = halted.end()
            node.run(["cryoci", "gc"], check=False)  # nor does a collection take what the journal names
            if left:
                node.run(["cryoci", "repair", mosaic.name])
            assert mosaic.journal() is None, (point, who, said)
            mosaic.must_be_as_before()
        node.run(checkpoint(mosaic, reference))  # and it still can be checkpointed
        assert [tag for tag in place.tags(where, mosaic) if "cryoci-memory" in tag] == []
        asked, before = mosaic.asked, mosaic.before
        node.sh(f"rm -f {mosaic.base}/rootfs/data/*")
        restore(mosaic, reference)
        mosaic.asked, mosaic.before = asked, before
        mosaic.must_be_as_before()


def test_a_registry_that_goes_away_leaves_it_stopped_until_it_is_there_again(
    place: Place, points: Points
) -> None:
    node = place.node
    with Mosaic(node, "runc", 23, mib=20) as mosaic:
        argv = checkpoint(mosaic, place.reference("registry", mosaic))
        halted = points.halt(argv, "held")
        place.stop_registry()
        said = halted.end()
        assert "can be reached: cryoci repair" in said, said
        journal = mosaic.journal()
        assert journal is not None and journal["state"] == "dropping"
        assert journal["source"].startswith(f"{place.registry}/straight/{mosaic.name}@sha256:")
        refused = node.run(["cryoci", "repair", mosaic.name], check=False)
        assert refused.returncode == 1 and b"cannot be read" in refused.stderr, refused.stderr
        place.start_registry()
        node.run(["cryoci", "repair", mosaic.name])
        assert mosaic.journal() is None
        mosaic.must_be_as_before()


def test_a_registry_that_takes_nothing_changes_nothing(place: Place) -> None:
    node = place.node
    with Mosaic(node, "crun", 24, mib=20) as mosaic:
        failed = node.run(checkpoint(mosaic, "127.0.0.1:1/no/registry:1"), check=False)
        assert failed.returncode == 1 and b"127.0.0.1:1" in failed.stderr, failed.stderr
        assert mosaic.journal() is None
        mosaic.must_be_as_before()


def test_a_budget_without_room_for_a_chunk_changes_nothing(place: Place) -> None:
    node = place.node
    with Large(node, "runc", 26, mib=100) as large:
        words = ("--memory-option", "chunk=1M", "--memory-option", "budget=1M")
        failed = node.run(checkpoint(large, place.reference("layout", large), *words), check=False)
        assert failed.returncode == 1 and b"--memory-option budget=4M" in failed.stderr, failed.stderr
        assert large.journal() is None
        large.must_be_as_before()


def test_processes_that_die_while_their_memory_is_away_leave_an_image(place: Place, points: Points) -> None:
    node = place.node
    with Mosaic(node, "runc", 25, mib=20) as mosaic:
        asked, before = mosaic.asked, mosaic.before
        argv = checkpoint(mosaic, place.reference("registry", mosaic))
        halted = points.halt(argv, "held")
        halted.kill(int(node.run(["pgrep", "-o", "-f", WHO["cryoci"]]).stdout))
        halted.end()
        node.run(["runc", "kill", mosaic.name, "KILL"])
        node.run(["runc", "resume", mosaic.name], check=False)
        journal = mosaic.journal()
        assert journal is not None
        said = node.run(["cryoci", "repair", mosaic.name], check=False)
        assert mosaic.journal() is None, said.stderr
        left = journal["directory"]
        assert "cryoci-memory-" in node.sh(f"ls {left}")  # whole, as a checkpoint of memory in files is
        node.run(["cryoci-runtime", "delete", "-f", mosaic.name], check=False)
        node.sh(f"rm -f {mosaic.base}/rootfs/data/*")
        mosaic.restore(images=left)
        mosaic.asked, mosaic.before = asked, before
        mosaic.must_be_as_before()
