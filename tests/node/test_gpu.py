# SPDX-License-Identifier: Apache-2.0
"""Containers with CUDA processes: checkpointed, restored, parked, on the fake driver and real CRIU and runtimes."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakegpu import build
from tests.fakegpu.build import UUIDS
from tests.node import gpu
from tests.node.conftest import Site
from tests.node.gpu import Trainer
from tests.node.subject import CONFIG, failing, leftovers
from tests.nodes import workload

pytestmark = pytest.mark.node
_numbers = itertools.count(1)
ONE = build.devices(UUIDS[:1])
TWO = build.devices(UUIDS[:2])


@pytest.fixture(params=["runc", "crun"])
def trainer(site: Site, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    """A container with a CUDA process and two CUDA children, on node a, whose only GPU node b has too."""
    for node in (site.a, site.b):
        gpu.equip(node, ONE, below=request.param)
    made = Trainer(site.a, f"t{next(_numbers)}", devices=ONE, children=2).start()
    yield made
    made.remove()


def test_stop_and_restore_elsewhere(site: Site, trainer: Trainer) -> None:
    before = trainer.runs_on()
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    assert trainer.status == "gone"
    shown = json.loads(site.b.run(["cryoci", "inspect", reference, "--json"]).stdout)
    annotations = shown["annotations"]
    assert annotations["io.cryoci.gpu.driver"] == "580.159.04"
    assert json.loads(annotations["io.cryoci.gpu.uuids"]) == [UUIDS[0]]
    assert annotations["io.cryoci.gpu.memory"] == str(3 << 20)
    copy = trainer.restore(reference, on=site.b)
    after = copy.runs_on()
    assert all(a["count"] > b["count"] for a, b in zip(after, before, strict=True))
    assert not site.b.sh(f"ls /run/cryoci/containers/default/{trainer.name}/gpu.json 2>/dev/null || true")
    copy.remove()


def test_leave_running(site: Site, trainer: Trainer) -> None:
    """It runs on its GPU at once, and its checkpoint runs elsewhere from that moment."""
    done = trainer.cryoci("checkpoint", "--leave-running", "-o", f"{site.registry}/gpu/{trainer.name}:1")
    assert {"gpu", "gpu restore"} <= done["seconds"].keys()
    trainer.runs_on()
    trainer.restore(f"{site.registry}/gpu/{trainer.name}:1", on=site.b).remove()


def test_straight_into_the_registry(site: Site, trainer: Trainer) -> None:
    """What the driver has brought into host memory is stored while it is captured; it comes back before the driver."""
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    with_memory = site.a.read(CONFIG).decode() + '[memory]\nthreshold = "1M"\nchunk = "1M"\n'
    site.a.write(CONFIG, with_memory)
    trainer.cryoci("checkpoint", "--straight", "--leave-running", "-o", reference)
    before = trainer.runs_on()
    done = trainer.cryoci("checkpoint", "--straight", "-o", reference, "--timeline", "/srv/straight.json")
    steps = [step["name"] for step in json.loads(site.a.read("/srv/straight.json"))["steps"]]
    assert steps.count("memory: store") >= 3 and done["warnings"] == []
    copy = trainer.restore(reference, on=site.b)
    after = copy.runs_on()
    assert all(a["count"] > b["count"] for a, b in zip(after, before, strict=True))
    copy.remove()


def test_annotated_create(site: Site, trainer: Trainer) -> None:
    """Between create and start CUDA is back already, and the container is frozen."""
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    spec = json.loads(site.a.read(f"{trainer.bundle}/config.json"))
    spec["annotations"] = {"io.cryoci.restore": reference}
    copy = Trainer(site.b, trainer.name, devices=ONE, children=2)
    site.b.run(["mkdir", "-p", f"{copy.bundle}/rootfs"])
    site.b.write(f"{copy.bundle}/config.json", json.dumps(spec))
    argv = ["cryoci-runtime", "create", "--bundle", copy.bundle, copy.name]
    workload.detach(site.b, argv, f"{copy.bundle}.log")
    assert copy.status == "created"
    seen = copy.steps()
    time.sleep(0.3)
    assert copy.steps() == seen
    site.b.run(["cryoci-runtime", "start", copy.name])
    copy.runs_on()
    assert copy.status == "running"
    copy.remove()


def test_in_the_foreground(site: Site, trainer: Trainer) -> None:
    """Without --detach the runtime below returns at the container's end; CUDA comes back all the same."""
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    site.b.sh(f"setsid cryoci restore {reference} >/srv/foreground.log 2>&1 </dev/null &")
    copy = Trainer(site.b, trainer.name, devices=ONE, children=2)
    copy.runs_on(0)
    copy.remove()


def test_the_runtimes_own_verbs(site: Site, trainer: Trainer) -> None:
    """As engines call them: CRI-O freezes first, podman does not; the images are a plain directory."""
    node, images = site.a, f"/srv/{trainer.name}.images"
    words = ["--image-path", images, "--work-path", f"{images}.work"]
    node.run(["cryoci-runtime", "pause", trainer.name])
    node.run(["cryoci-runtime", "checkpoint", "--leave-running", *words, trainer.name])
    assert trainer.status == "paused"  # as it was found
    node.run(["cryoci-runtime", "resume", trainer.name])
    trainer.runs_on()
    dump = build.valid_dump(node.read(f"{images}/gpu.dump"))
    assert [len(dump["tasks"]), dump["gpus"][0]["uuid"]] == [3, UUIDS[0]]
    node.run(["rm", "-r", images])
    node.run(["cryoci-runtime", "checkpoint", *words, trainer.name])
    assert trainer.status in ("stopped", "gone")
    node.run(["cryoci-runtime", "delete", "--force", trainer.name], check=False)
    argv = ["cryoci-runtime", "restore", "--detach", "--bundle", trainer.bundle, *words, trainer.name]
    workload.detach(node, argv, f"{trainer.bundle}.log")
    trainer.runs_on()


def test_park_and_unpark(site: Site, trainer: Trainer) -> None:
    def row() -> dict[str, Any]:
        listed = json.loads(site.a.run(["cryoci", "ps", "--json"]).stdout)
        return next(one for one in listed if one["name"] == trainer.name)

    for _ in range(3):
        before = row()
        assert (before["state"], before["vram"], before["gpus"]) == ("running", 3 << 20, [UUIDS[0]])
        parked = trainer.cryoci("park")
        assert (parked["state"], parked["vram"], parked["changed"]) == ("parked", 3 << 20, True)
        assert trainer.cryoci("park")["changed"] is False
        after = row()
        assert (after["state"], after["vram"], after["gpus"]) == ("parked", 0, [UUIDS[0]])
        assert after["host"] > before["host"] + (2 << 20)  # what it held is host memory now
        assert trainer.cryoci("unpark")["changed"] is True
        assert trainer.cryoci("unpark")["changed"] is False
        trainer.runs_on()
    trainer.cryoci("park", "--report", "/srv/park.html", "--timeline", "/srv/park.json")
    steps = [one["name"] for one in json.loads(site.a.read("/srv/park.json"))["steps"]]
    assert sum(name.startswith("driver: checkpoint of") for name in steps) == 3
    assert "cryoci park" in site.a.read("/srv/park.html").decode()
    trainer.cryoci("unpark", "--report", "/srv/unpark.html")
    assert "driver: restore of" in site.a.read("/srv/unpark.html").decode()
    trainer.runs_on()


def test_a_parked_container_is_checkpointed_and_restored(site: Site, trainer: Trainer) -> None:
    trainer.cryoci("park")
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "--leave-running", "-o", reference)
    assert trainer.status == "paused"  # still parked
    copy = trainer.restore(reference, on=site.b)
    copy.runs_on()
    copy.remove()
    trainer.cryoci("unpark")
    trainer.runs_on()


def test_unpark_waits_for_room(site: Site, trainer: Trainer) -> None:
    """A restore that runs out of GPU memory is lost for good, so it is not begun."""
    trainer.cryoci("park")
    fat = Trainer(site.a, f"{trainer.name}-fat", devices=ONE, mib=62).start()
    said = failing(site.a, ["cryoci", "unpark", trainer.name])
    assert "MiB free, and the checkpoint needs 3 MiB" in said and "cryoci park" in said
    fat.cryoci("park")  # hot swap
    trainer.cryoci("unpark")
    trainer.runs_on()
    fat.remove()


@pytest.mark.parametrize("step", ["lock", "checkpoint", "restore", "unlock"])
def test_the_tool_is_killed_at_each_step(site: Site, trainer: Trainer, step: str) -> None:
    """Before and after each step of the driver: repair brings the container back to its GPU."""
    for mode, nth in (("die-before", 1), ("die-after", 2)):
        gpu.faults(site.a, f"{step} {nth} 0 {mode}")
        argv = ["cryoci", "checkpoint", trainer.name, "--leave-running", "-o", f"/srv/{trainer.name}.{mode}"]
        assert site.a.run(argv, check=False).returncode not in (0, 1, 2)
        gpu.faults(site.a)
        said = site.a.run(["cryoci", "repair", trainer.name]).stdout.decode()
        assert "CUDA processes back on their GPUs" in said
        trainer.runs_on()
        assert "nothing was left to repair" in site.a.run(["cryoci", "repair", trainer.name]).stdout.decode()


def test_repair_of_one_that_its_user_has_paused(site: Site, trainer: Trainer) -> None:
    """The driver answers nothing of a frozen process: it is thawed for the question, and frozen again."""
    site.a.run(["cryoci-runtime", "pause", trainer.name])
    assert "nothing was left to repair" in site.a.run(["cryoci", "repair", trainer.name]).stdout.decode()
    assert trainer.status == "paused"
    site.a.run(["cryoci-runtime", "resume", trainer.name])
    trainer.runs_on()


def test_the_next_checkpoint_repairs_too(site: Site, trainer: Trainer) -> None:
    gpu.faults(site.a, "checkpoint 2 0 die-after")
    argv = ["cryoci", "checkpoint", trainer.name, "--leave-running", "-o"]
    site.a.run([*argv, f"/srv/{trainer.name}.1"], check=False)
    gpu.faults(site.a)
    site.a.run([*argv, f"/srv/{trainer.name}.2"])
    trainer.runs_on()


@pytest.mark.parametrize("fault", ["lock 2 600 before", "checkpoint 3 999 before", "lock 1 0 before"])
def test_a_failure_leaves_it_running(site: Site, trainer: Trainer, fault: str) -> None:
    before = leftovers(site.a)
    gpu.faults(site.a, fault)
    failing(site.a, ["cryoci", "checkpoint", trainer.name])
    gpu.faults(site.a)
    assert trainer.status == "running"
    trainer.runs_on()
    assert leftovers(site.a) == before


def test_a_dump_that_fails_brings_cuda_back(site: Site, trainer: Trainer) -> None:
    before = leftovers(site.a)
    site.a.write(
        "/usr/local/sbin/criu",
        '#!/bin/sh\n[ "$1" = --version ] && exec /usr/sbin/criu "$@"\nexit 1\n',
        mode=0o755,
    )
    failing(site.a, ["cryoci", "checkpoint", trainer.name])
    site.a.run(["rm", "/usr/local/sbin/criu"])
    trainer.runs_on()
    assert leftovers(site.a) == before


@pytest.mark.parametrize("fault", ["restore 2 2 before", "unlock 1 401 before", "restore 1 0 before"])
def test_a_restore_that_fails_leaves_nothing(site: Site, trainer: Trainer, fault: str) -> None:
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    before = leftovers(site.b)
    gpu.faults(site.b, fault)
    failing(site.b, ["cryoci", "restore", reference, "--detach"])
    gpu.faults(site.b)
    assert leftovers(site.b) == before
    copy = trainer.restore(reference, on=site.b)
    copy.runs_on()
    copy.remove()


def test_another_gpu(site: Site, trainer: Trainer) -> None:
    """By map, by choice, and refused with both names where the chip is another."""
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    gpu.equip(site.b, build.devices(UUIDS[2:3], chip="Fake L4"), below=_below(site, trainer))
    said = failing(site.b, ["cryoci", "restore", reference, "--detach"])
    assert f"another {build.CHIP}" in said and "Fake L4" in said
    gpu.equip(site.b, build.devices(UUIDS[1:3]), below=_below(site, trainer))
    for words, uuid in (
        ((), UUIDS[1]),
        (("--device-map", f"{UUIDS[0]}={UUIDS[2]}"), UUIDS[2]),
        (("--device-map", "0=1"), UUIDS[2]),
    ):
        copy = trainer.restore(reference, *words, on=site.b)
        assert {s["uuid"] for s in copy.runs_on()} == {uuid.removeprefix("GPU-").replace("-", "")}
        copy.remove()
    assert "no GPU of the checkpoint" in failing(
        site.b, ["cryoci", "restore", reference, "--device-map", "7=0"]
    )


def test_too_little_gpu_memory_is_refused_before_anything(site: Site, trainer: Trainer) -> None:
    reference = f"{site.registry}/gpu/{trainer.name}:1"
    trainer.cryoci("checkpoint", "-o", reference)
    fat = Trainer(site.b, f"{trainer.name}-fat", devices=ONE, mib=62).start()
    before = leftovers(site.b)
    assert "MiB free, and the checkpoint needs 3 MiB" in failing(site.b, ["cryoci", "restore", reference])
    assert leftovers(site.b) == before
    fat.remove()


def _below(site: Site, trainer: Trainer) -> str:
    return site.a.read("/etc/cryoci/config.toml").decode().split('"')[1]
