# SPDX-License-Identifier: Apache-2.0
"""The main job: a container checkpointed on one node runs on, on a node that never saw it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests import pages
from tests.node import everything
from tests.node.conftest import Site
from tests.node.subject import (
    CONFIG,
    KINDS,
    TMPFS,
    UNUSED,
    Kind,
    Subject,
    connections,
    echo,
    failing,
    leftovers,
    records,
    runs_on,
)
from tests.nodes.node import Node

pytestmark = pytest.mark.node


def mark(subject: Subject) -> None:
    """Leave a trace in every kind of file system that has to travel."""
    for path in ("/root/new", f"{TMPFS}/mark", "/dev/shm/mark"):
        assert subject.ask(f"/write?path={path}&text=here") == {"written": 4}
    subject.inside("rm", UNUSED)


def assert_marked(subject: Subject) -> None:
    for path in ("/root/new", f"{TMPFS}/mark", "/dev/shm/mark"):
        assert subject.ask(f"/read?path={path}") == {"text": "here"}
    assert not subject.has(UNUSED) and subject.has("/usr/bin/cat")


def travel(site: Site, reference: str) -> str:
    """Make what `reference` names on node a usable on node b."""
    if reference.startswith("oci:"):
        path = reference.split(":")[1]
        shutil.copytree(site.a.path(path), site.b.path(path))
    return reference


def timeline(node: Node, path: str) -> dict[str, dict[str, Any]]:
    """The steps in a timeline of a node, by name."""
    return {step["name"]: step for step in json.loads(node.sh(f"cat {path}"))["steps"]}


more = [pytest.mark.more]


def journeys() -> Iterator[Any]:
    """Every kind by every place and by both ends.

    Who ran it does not know where it goes, so half of the cells, which have every pair of two, prove as much.
    """
    for n, (name, kind) in enumerate(KINDS.items()):
        for place in ("layout", "registry"):
            for end in ("stop", "leave-running"):
                marks = more if (n + (place == "registry") + (end == "stop")) % 2 else []
                yield pytest.param(
                    kind, place, end == "leave-running", id=f"{place}-{end}-{name}", marks=marks
                )


@pytest.mark.parametrize(("kind", "place", "leave"), list(journeys()))
def test_runs_on_elsewhere(site: Site, kind: Kind, place: str, leave: bool) -> None:
    subject = site.subject(kind)
    subject.start()
    mark(subject)
    before, pid = subject.ask(), subject.pid
    reference = f"oci:/srv/layout-{subject.name}:c"
    if place == "registry":
        reference = f"{site.registry}/checkpoints/{subject.name}:1"
    report = subject.checkpoint(reference, *(["--leave-running"] if leave else []))
    assert report["image"]["digest"].startswith("sha256:")
    if leave:
        runs_on(before, subject.wait(before["count"] + 3))
        assert_marked(subject)
    else:
        assert subject.status == ("exited" if kind.podman else "gone")
        assert not site.a.path(f"/proc/{pid}").exists()
    there = subject.on(site.b)
    there.restore(travel(site, reference))
    runs_on(before, there.wait(before["count"] + 3))
    assert_marked(there)
    assert len(there.cgroups) == 1
    if kind.podman:
        inspected = json.loads(site.b.run(["podman", "container", "inspect", there.name]).stdout)[0]
        assert inspected["OCIRuntime"] == kind.runtime
        assert f"count {before['count'] + 3}\n" in site.b.sh(f"podman logs {there.name}")
    for node in (site.a, site.b):
        assert node.sh("ls -A /var/lib/cryoci/tmp /tmp") == "/tmp:\n\n/var/lib/cryoci/tmp:\n"
        assert "held.json" not in records(node)
    there.remove()
    subject.remove()
    assert records(site.b) == ""


# What cryoci restored of a bare container is cryoci-runtime's, whoever ran it before; and each engine and each runtime
# is among these three.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            k, id=name, marks=[] if name in ("podman+cryoci-runtime", "podman+crun", "runc") else more
        )
        for name, k in KINDS.items()
    ],
)
def test_a_copy_and_the_second_generation(site: Site, kind: Kind) -> None:
    subject = site.subject(kind)
    subject.start()
    mark(subject)
    before = subject.ask()
    first = f"{site.registry}/checkpoints/{subject.name}:first"
    subject.checkpoint(first, "--timeline", "/srv/checkpoint.json", "--report", "/srv/checkpoint.html")
    took = timeline(site.a, "/srv/checkpoint.json")
    assert {"freeze", "dump", "store", "stop"} <= took.keys() and took["store"]["bytes"] > 0
    assert any(" checkpoint " in name and took[name]["depth"] > took["dump"]["depth"] for name in took)
    subject.remove()
    there, copy = subject.on(site.b), subject.on(site.b, f"{subject.name}-copy")
    there.restore(first, "--timeline", "/srv/restore.json", "--report", "/srv/restore.html")
    took = timeline(site.b, "/srv/restore.json")
    assert {"fetch", "restore"} <= took.keys() and took["fetch"]["bytes"] > 0
    assert any(" restore " in name and took[name]["depth"] > took["restore"]["depth"] for name in took)
    if kind.podman:  # memory is not in podman's archive where its runtime can do without
        assert ("take over memory" in took) == (kind.runtime == "cryoci-runtime")
    for node, name in ((site.a, "checkpoint"), (site.b, "restore")):
        found = pages.check(node.sh(f"cat /srv/{name}.html"))
        assert {"timeline", "sizes", "processes", "memory", "node", "versions"} <= set(found.values("id"))
        assert subject.name in found.text and "heap" in found.text and "anonymous" in found.text
    copy.restore(first, "--name", copy.name)
    seen = there.wait(before["count"] + 3)
    runs_on(before, seen)
    copied = copy.wait(before["count"] + 3)
    runs_on(before, copied)
    assert there.pid != copy.pid and there.id != copy.id
    assert len(there.cgroups) == len(copy.cgroups) == 1 and there.cgroups != copy.cgroups
    there.ask("/write?path=/root/second&text=again")
    seen = there.ask()
    there.checkpoint(f"{there.name}:second")
    assert there.status == ("exited" if kind.podman else "gone")
    there.remove()
    runs_on(copied, copy.wait(copied["count"] + 1))  # nobody touched it
    there.restore(f"{there.name}:second")
    runs_on(seen, there.wait(seen["count"] + 3))
    assert_marked(there)
    assert there.ask("/read?path=/root/second") == {"text": "again"}
    assert copy.ask("/read?path=/root/second").keys() == {"error"}
    there.remove()
    copy.remove()


def test_a_named_volume_travels_on_request(site: Site) -> None:
    subject = site.subject(KINDS["podman+cryoci-runtime"])
    volume = f"{subject.name}-data"
    subject.start(options=(f"--volume={volume}:/data",))
    subject.ask("/write?path=/data/mark&text=carried")
    before = subject.ask()
    reference = f"{site.registry}/checkpoints/{subject.name}:1"
    subject.checkpoint(reference, "--volumes")
    there = subject.on(site.b)
    there.restore(reference)
    runs_on(before, there.wait(before["count"] + 3))
    assert there.ask("/read?path=/data/mark") == {"text": "carried"}
    assert volume in site.b.sh("podman volume ls --quiet").split()
    there.remove()
    subject.remove()
    site.b.run(["podman", "volume", "rm", "--force", volume])
    site.a.run(["podman", "volume", "rm", "--force", volume])


def test_a_volume_left_behind_is_named(site: Site) -> None:
    """Its open file is not there on the other node, and nothing stays behind for it."""
    subject = site.subject(KINDS["podman+cryoci-runtime"])
    volume = f"{subject.name}-data"
    subject.start(options=(f"--volume={volume}:/data",))
    reference = f"{site.registry}/checkpoints/{subject.name}:1"
    subject.checkpoint(reference, "--leave-running")
    before = leftovers(site.b)
    said = failing(site.b, ["cryoci", "restore", reference, "--detach"])
    assert "data/c" in said and "--volumes" in said  # count.log or child.log
    assert leftovers(site.b) == before
    subject.remove()


def lan(site: Site) -> str:
    """A podman network on nodes a and b whose containers have addresses of the nodes' own network."""
    for node in (site.a, site.b):
        node.run([
            "podman", "network", "create", "--ignore", "--driver=macvlan", "--opt=parent=eth0",
            "--subnet=10.77.0.0/24", "--gateway=10.77.0.1", "--ip-range=10.77.0.192/28", "lan",
        ])  # fmt: skip
    return "lan"


@pytest.mark.parametrize(
    "kind", [KINDS[k] for k in ("podman+cryoci-runtime", "podman+crun")], ids=["runc", "crun"]
)
def test_an_established_connection_moves_along(site: Site, kind: Kind) -> None:
    """The container keeps its address, and its peer on a third node never notices."""
    network = lan(site)
    port = echo(site.c)
    subject = site.subject(kind)
    address = "10.77.0.200" if kind.below == "runc" else "10.77.0.201"
    options = (f"--network={network}", f"--ip={address}")
    before = subject.start(f"--connect={site.c.address}:{port}", options=options)
    assert before["peer"] == "open"
    reference = f"{site.registry}/checkpoints/{subject.name}:1"
    said = failing(site.a, ["cryoci", "checkpoint", subject.name, "--output", reference])
    assert "established TCP connections" in said and "--tcp-established" in said
    before = subject.wait(before["count"] + 3)
    assert before["peer"] == "open"
    sockets = connections(site.c, port)
    subject.checkpoint(reference, "--tcp-established")
    assert subject.status == "exited"
    there = subject.on(site.b)
    there.restore(reference)
    after = there.wait(before["count"] + 3)
    runs_on(before, after)
    assert after["peer"] == "open"
    assert connections(site.c, port) == sockets and len(sockets) >= 1  # the same sockets, not new ones
    there.remove()
    subject.remove()


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_an_established_connection_is_closed(site: Site, below: str) -> None:
    """podman 5.4 has no --tcp-close: the option goes beside it. The application sees its peer gone, and runs on."""
    kind = KINDS["podman+cryoci-runtime"]
    for node in (site.a, site.b):
        node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    try:
        subject = site.subject(kind)
        before = subject.start(f"--connect={site.c.address}:{echo(site.c)}")
        assert before["peer"] == "open"
        image = f"{site.registry}/checkpoints/{subject.name}:1"
        subject.checkpoint(image, "--tcp-established")
        subject.remove()
        there = subject.on(site.b)
        there.restore(image, "--tcp-close")
        after = there.wait(before["count"] + 3)
        runs_on(before, after)
        assert after["peer"] != "open"
        there.remove()
    finally:
        for node in (site.a, site.b):
            node.run(["rm", "-f", CONFIG])


@pytest.mark.parametrize("kind", [KINDS["runc"], KINDS["crun"]], ids=["runc", "crun"])
def test_a_connection_survives_at_the_same_address(site: Site, kind: Kind) -> None:
    """Bare, in the node's own network: it can come back only where the address is, so on the same node."""
    port = echo(site.c)
    subject = site.subject(kind)
    before = subject.start(f"--connect={site.c.address}:{port}", network=False)
    assert before["peer"] == "open"
    sockets = connections(site.c, port)
    subject.checkpoint(f"{subject.name}:1", "--tcp-established")
    assert subject.status == "gone"
    said = failing(site.a, ["cryoci", "restore", f"{subject.name}:1", "--detach"])
    assert "host-namespaces" in said and "--allow host-namespaces" in said
    subject.restore(f"{subject.name}:1", "--allow", "host-namespaces")
    after = subject.wait(before["count"] + 3)
    runs_on(before, after)
    assert after["peer"] == "open" and connections(site.c, port) == sockets
    subject.remove()


@pytest.mark.parametrize(
    "kind", [KINDS["podman+cryoci-runtime"], KINDS["podman+crun"]], ids=["runc", "crun"]
)
def test_an_init_is_that_of_the_other_node(site: Site, kind: Kind) -> None:
    """`podman run --init`: process 1 is a program of the node, which the other one must have too."""
    everything.give_init(site.a)
    subject = site.subject(kind)
    before = subject.start(options=("--init",))
    reference = f"{site.registry}/checkpoints/{subject.name}:1"
    subject.checkpoint(reference)
    there = subject.on(site.b)
    site.b.run(["rm", "-f", everything.INIT])
    clean = leftovers(site.b)
    said = failing(site.b, ["cryoci", "restore", reference, "--detach"])
    assert "process 1 is podman's init" in said and "apt-get install catatonit" in said
    site.b.sh('mkdir -p "${1%/*}" && cp /bin/true "$1"', everything.INIT)
    said = failing(site.b, ["cryoci", "restore", reference, "--detach"])
    assert "podman's init (--init, run/podman-init in the container) is another build here" in said
    assert leftovers(site.b) == clean
    everything.give_init(site.b)
    there.restore(reference)
    runs_on(before, there.wait(before["count"] + 3))
    assert there.inside("cat", "/proc/1/comm") == "podman-init\n"
    site.b.run(["podman", "stop", "--time=20", there.name])
    assert site.b.sh(f"podman inspect --format={{{{.State.ExitCode}}}} {there.name}").strip() == "0"
    there.remove()
    subject.remove()
