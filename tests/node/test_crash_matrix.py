# SPDX-License-Identifier: Apache-2.0
"""kill -9 of anybody at any point while memory is out of band. Each cell of docs/crash-matrix.md is a test of its own,
those with ″ with --all-cells only.

A cell is what has to be left: `runs on`, `repaired` (it runs on after `cryoci repair`), `image` (the container is
gone, and its checkpoint restores), `again` (the same command does it), `whole` (it was done), or `ended` (killed
before there was an image).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.node.crash import CRIU_POINTS, POINTS, STATES, Halted, Points
from tests.node.test_memory import RESTING, Mosaic, configure
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

PAGE = Path(__file__).resolve().parents[2] / "docs" / "crash-matrix.md"
OUT, SAVED, PARENT = "/srv/crash/out", "/srv/crash/saved", "/srv/crash/parent"
WHO = {"cryoci": "bin/cryoci (checkpoint|restore|flatten) ", "runtime": r"launcher.py (checkpoint|restore) "}
NOBODY, AS_ABOVE = "-", "″"


@dataclass(frozen=True)
class Cell:
    """Kill `who` at `point` of `verb` under `kind`, with a journal of that state, and this must be left."""

    kind: str
    verb: str
    point: str
    journal: str
    who: str
    left: str
    as_above: bool

    def __str__(self) -> str:
        return f"{self.kind}-{self.verb}-{self.point}-{self.who}"


def cells(text: str) -> list[Cell]:
    """The tables below headings like "## checkpoint, runc", with a column for each victim."""
    found: list[Cell] = []
    kind = verb = ""
    columns: list[str] = []
    for line in text.splitlines():
        if head := re.fullmatch(r"## (\w+), (\w+)", line):
            verb, kind, columns = head[1], head[2], []
        elif line.startswith("#"):
            kind = ""
        elif kind and line.startswith("|"):
            words = [word.strip() for word in line.strip("|").split("|")]
            if not columns:
                columns = words
            elif point := re.match(r"`(\w+)`", words[0]):
                for who, left in zip(columns[2:], words[2:], strict=True):
                    if left == AS_ABOVE:
                        above = meant(found, kind, verb, point[1], who)
                        found.append(Cell(kind, verb, point[1], words[1], who, above.left, True))
                    elif left != NOBODY:
                        found.append(Cell(kind, verb, point[1], words[1], who, left, False))
    return found


def meant(found: list[Cell], kind: str, verb: str, point: str, who: str) -> Cell:
    """What ″ stands for: the nearest cell above it, in a table's first row that of the same point before."""
    column = [cell for cell in found if cell.who == who]
    above = [cell for cell in column if (cell.kind, cell.verb) == (kind, verb)]
    return (above or [cell for cell in column if cell.point == point])[-1]


CELLS = cells(PAGE.read_text())


def test_the_page_has_every_point_and_state() -> None:
    runc = {cell.point for cell in CELLS if cell.kind == "runc"}
    assert runc == {*POINTS, *STATES, *CRIU_POINTS}
    assert {cell.kind for cell in CELLS} == {"runc", "crun"}
    assert {cell.who for cell in CELLS} == {"cryoci", "runtime", "criu", "container"}


class Scene:
    """A node whose cryoci halts at points, and one container of each kind, made anew when it has been killed."""

    def __init__(self, node: NamespaceNode) -> None:
        self.node, self.points = node, Points(node)
        self.alive: dict[str, Mosaic] = {}
        self.saved: dict[str, tuple[int, dict[str, Any]]] = {}  # what each had told when it was saved

    def mosaic(self, kind: str) -> Mosaic:
        """It runs, and as it did before."""
        configure(self.node, kind)
        if kind in self.alive and self.status(self.alive[kind]) != "running":  # an earlier test has failed
            self.end(kind)
        if kind not in self.alive:
            made = Mosaic(self.node, kind, 4, mib=8, pace=RESTING)
            made.__enter__()
            self.alive[kind] = made
        return self.alive[kind]

    def end(self, kind: str) -> None:
        if kind in self.alive:
            self.alive.pop(kind).__exit__()

    def status(self, mosaic: Mosaic) -> str:
        asked = self.node.run([mosaic.kind, "state", mosaic.name], check=False)
        return str(json.loads(asked.stdout)["status"]) if asked.returncode == 0 else "gone"

    def victim(self, who: str, halted: Halted, mosaic: Mosaic) -> int:
        if who == "criu":
            return halted.pid
        if who == "container":
            return int(json.loads(self.node.run([mosaic.kind, "state", mosaic.name]).stdout)["pid"])
        return int(self.node.run(["pgrep", "-o", "-f", WHO[who]]).stdout)

    def halt(self, cell: Cell, argv: list[str], log: str = "") -> Halted:
        """Run a command to where somebody is to be killed; the journal is what the page says."""
        halted = self.points.halt(argv, cell.point, log)
        assert (self.alive[cell.kind].journal() or {"state": "none"})["state"] == cell.journal
        return halted

    def exists(self, path: str) -> bool:
        return self.node.run(["test", "-e", path], check=False).returncode == 0

    def restore(self, mosaic: Mosaic, source: str) -> None:
        """Restore it on its bundle; it answers from where it was when `source` was made."""
        workload.detach(self.node, restoring(mosaic, source), f"{mosaic.base}/log")


def restoring(mosaic: Mosaic, source: str) -> list[str]:
    return ["cryoci", "restore", source, "--detach", "--bundle", mosaic.base]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """One for all cells."""
    with Cluster(tag="crash") as cluster:
        made = Scene(cluster.start("a"))
        made.node.sh("mkdir /srv/crash")
        yield made
        for kind in list(made.alive):
            made.end(kind)


def of(*verbs: str) -> pytest.MarkDecorator:
    found = [
        pytest.param(cell, marks=[pytest.mark.more] if cell.as_above else [])
        for cell in CELLS
        if cell.verb in verbs
    ]
    return pytest.mark.parametrize("cell", found, ids=str)


@of("checkpoint", "incremental")
def test_checkpoint(scene: Scene, cell: Cell) -> None:
    node, mosaic = scene.node, scene.mosaic(cell.kind)
    argv = ["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-o", OUT]
    sums = ""
    if cell.verb == "incremental":
        if not scene.exists(PARENT):
            node.run([*argv[:-1], PARENT, "-R"])
        sums = node.sh(f"find {PARENT} -type f | sort | xargs sha256sum")
        argv += ["--incremental", "--parent", PARENT]
    if cell.point != "ending":
        argv += ["-R"]
    node.sh(f"rm -rf {OUT}")
    halted = scene.halt(cell, argv, f"{OUT}/dump.log")
    halted.kill(scene.victim(cell.who, halted, mosaic))
    if cell.who == "cryoci" and mosaic.journal() and not halted.gone:
        refused = node.run(["cryoci", "repair", mosaic.name], check=False)
        assert refused.returncode == 1 and b"is moving memory" in refused.stderr, refused.stderr
    said = halted.end()
    status = scene.status(mosaic)
    if status in ("running", "paused"):
        left = "repaired" if mosaic.journal() or status == "paused" else "runs on"
        if left == "repaired":
            node.run(["cryoci", "repair", mosaic.name])
        assert mosaic.journal() is None
        mosaic.must_be_as_before()
        assert scene.status(mosaic) == "running"
    else:
        # repair takes the journal of a container that is gone, and has nothing else to do
        if mosaic.journal() is not None:
            assert b"stopped" in node.run(["cryoci", "repair", mosaic.name], check=False).stderr
        assert mosaic.journal() is None
        left = "image" if scene.exists(f"{OUT}/cryoci.json") else "ended"
        if left == "image":
            mosaic.delete()
            scene.restore(mosaic, OUT)
            mosaic.must_be_as_before()
        else:
            assert not scene.exists(f"{OUT}/checkpoint/inventory.img")
            scene.end(cell.kind)
    assert left == cell.left, said
    if sums:
        assert node.sh(f"find {PARENT} -type f | sort | xargs sha256sum") == sums


@pytest.mark.parametrize("kind", ["runc"])
def test_all_threads_stand_at_a_loop_while_criu_works(scene: Scene, kind: str) -> None:
    """Whatever lets them run then, a killed CRIU above all, they do nothing, and go on from where they were."""
    node, mosaic = scene.node, scene.mosaic(kind)
    node.sh(f"rm -rf {OUT}")
    argv = ["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-R", "-o", OUT]
    halted = scene.points.halt(argv, "dropped", f"{OUT}/dump.log")
    first = scene.victim("container", halted, mosaic)
    found = node.sh(f"echo {first}; pgrep -P {first}").split()
    threads = [one for pid in found for one in node.path(f"/proc/{pid}/task").iterdir()]
    assert len(threads) > 4
    for thread in threads:
        at = int((thread / "syscall").read_text().split()[-1], 16)
        with (thread / "mem").open("rb", buffering=0) as memory:
            memory.seek(at)
            assert memory.read(2) == b"\xeb\xfe"
    assert halted.end() and halted.process.returncode == 0
    mosaic.must_be_as_before()


@of("restore")
def test_restore(scene: Scene, cell: Cell) -> None:
    node, mosaic = scene.node, scene.mosaic(cell.kind)
    if not scene.exists(SAVED + cell.kind):
        node.run(["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-o", SAVED + cell.kind])
        scene.saved[cell.kind] = mosaic.asked, mosaic.before
    node.run(["cryoci-runtime", "delete", "-f", mosaic.name], check=False)
    mosaic.asked, mosaic.before = scene.saved[cell.kind]
    node.sh(f"rm -f {mosaic.base}/rootfs/data/*")
    log = "/var/lib/cryoci/tmp/restore-work.*/restore.log"
    halted = scene.halt(cell, restoring(mosaic, SAVED + cell.kind), log)
    halted.kill(scene.victim(cell.who, halted, mosaic))
    said = halted.end()
    status = scene.status(mosaic)
    if status in ("running", "paused"):
        left = "repaired" if mosaic.journal() else "runs on"
        if left == "repaired":
            node.run(["cryoci", "repair", mosaic.name])
    else:
        left = "again"
        node.run(["cryoci-runtime", "delete", "-f", mosaic.name], check=False)
        scene.restore(mosaic, SAVED + cell.kind)
    assert mosaic.journal() is None
    mosaic.must_be_as_before()
    assert left == cell.left, said


@of("flatten")
def test_flatten(scene: Scene, cell: Cell) -> None:
    node, mosaic = scene.node, scene.mosaic(cell.kind)
    base, thin = "/srv/crash/base", "/srv/crash/thin"
    node.sh(f"rm -rf {base} {thin}")
    argv = ["cryoci", "checkpoint", mosaic.name, "--rootfs=none", "-R", "-o"]
    node.run([*argv, base])
    node.run([*argv, thin, "--incremental", "--thin", "--parent", base])
    asked, before = mosaic.asked, mosaic.before
    halted = scene.halt(cell, ["cryoci", "flatten", thin])
    halted.kill(halted.pid)
    halted.end()
    if cell.left == "again":
        node.run(["cryoci", "flatten", thin])
    node.sh(f"rm -r {base}")
    node.run(["cryoci-runtime", "delete", "-f", mosaic.name])
    node.sh(f"rm -f {mosaic.base}/rootfs/data/*")
    scene.restore(mosaic, thin)
    mosaic.asked, mosaic.before = asked, before
    mosaic.must_be_as_before()
