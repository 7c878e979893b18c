# SPDX-License-Identifier: Apache-2.0
"""Memory out of band through `cryoci checkpoint` and `cryoci restore`, under podman and without."""

from __future__ import annotations

import json

import pytest

from tests.node.conftest import Site
from tests.node.subject import CONFIG, KINDS, Kind, failing, records, runs_on

pytestmark = pytest.mark.node

MEMORY = '[memory]\nengine = "parallel"\nthreshold = "1M"\nchunk = "1M"\n'


@pytest.mark.parametrize("leave", [False, True], ids=["stop", "leave-running"])
@pytest.mark.parametrize("name", ["podman+cryoci-runtime", "podman+crun", "runc"])
def test_runs_on_elsewhere_with_its_memory(site: Site, name: str, leave: bool) -> None:
    kind: Kind = KINDS[name]
    for node in (site.a, site.b):
        node.write(CONFIG, MEMORY)
    subject = site.subject(kind)
    before = subject.start()
    reference = f"{site.registry}/checkpoints/{subject.name}:1"
    report = subject.checkpoint(reference, *(["--leave-running"] if leave else []))
    digest = report["image"]["digest"]
    assert digest.startswith("sha256:")
    if leave:
        runs_on(before, subject.wait(before["count"] + 3))
    else:
        assert subject.status == ("exited" if kind.podman else "gone")
    assert "memory.json" not in records(site.a)
    assert site.a.sh("ls -A /var/lib/cryoci/tmp") == ""
    site.a.run(["cryoci", "pull", reference, f"/srv/look-{subject.name}"])
    held = site.a.sh(
        f"cd /srv/look-{subject.name}/checkpoint && ls cryoci-memory-* 2>/dev/null || true"
    ).split()
    # podman would restore it by its plain crun, which knows nothing of such files: CRIU keeps it all
    assert bool(held) == (name != "podman+crun")
    there = subject.on(site.b)
    there.restore(reference)
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()
    subject.remove()


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_straight_into_the_registry_under_podman(site: Site, below: str) -> None:
    for node in (site.a, site.b):
        node.write(CONFIG, f'[runtime]\npath = "{below}"\n{MEMORY.replace("parallel", "criu")}')
    subject = site.subject(KINDS["podman+cryoci-runtime"])
    before = subject.start()
    reference = f"{site.registry}/checkpoints/{subject.name}:1"
    subject.checkpoint(reference, "--straight", "-R")
    before = subject.wait(before["count"] + 3)
    report = subject.checkpoint(reference, "--straight", "--timeline", "/srv/straight.json")
    steps = [step["name"] for step in json.loads(site.a.read("/srv/straight.json"))["steps"]]
    assert steps.count("memory: store") >= 3 and "memory: drop" in steps
    assert report["warnings"] == [] and subject.status == "exited"
    assert "memory.json" not in records(site.a)
    assert site.a.sh("ls -A /var/lib/cryoci/tmp") == ""
    there = subject.on(site.b)
    there.restore(reference)
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()
    subject.remove()


def test_straight_is_refused_where_podman_would_restore_by_its_own_runtime(site: Site) -> None:
    subject = site.subject(KINDS["podman+crun"])
    before = subject.start()
    argv = ["cryoci", "checkpoint", subject.name, "--straight", "-o", f"{site.registry}/{subject.name}:1"]
    assert "podman --runtime cryoci-runtime" in failing(site.a, argv)
    assert subject.status == "running"
    runs_on(before, subject.wait(before["count"] + 3))
    subject.remove()


def test_a_push_that_fails_gives_the_memory_back(site: Site) -> None:
    site.a.write(CONFIG, MEMORY)
    subject = site.subject(KINDS["podman+cryoci-runtime"])
    before = subject.start()
    argv = ["cryoci", "checkpoint", subject.name, "--output", "127.0.0.1:1/no/registry:1", "--json"]
    failed = site.a.run(argv, check=False, timeout=120)
    assert failed.returncode == 1
    runs_on(before, subject.wait(before["count"] + 3))
    state = json.loads(site.a.run(["podman", "container", "inspect", subject.name]).stdout)[0]["State"]
    assert state["Status"] == "running"
    assert "memory.json" not in records(site.a)
    subject.remove()
