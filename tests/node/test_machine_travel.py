# SPDX-License-Identifier: Apache-2.0
"""A container with a bit of everything goes from machine to machine and back, its limits with it."""

from __future__ import annotations

import pytest

from tests.node import everything
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.machine import Machine

pytestmark = [pytest.mark.machine, pytest.mark.timeout(900)]

LIMITS = {"memory.max": str(192 << 20), "pids.max": "60", "cpu.max": "90000 100000"}
OPTIONS = ("--init", "--memory=192m", "--pids-limit=60", "--cpus=0.9")
NEW = {**LIMITS, "memory.max": str(256 << 20), "pids.max": "50"}


@pytest.fixture(scope="module")
def registry(machine_cluster: Cluster, two_machines: tuple[Machine, Machine]) -> str:
    """A registry for both machines, which have what `--init` needs."""
    for machine in two_machines:
        everything.give_init(machine)
    return machine_cluster.registry(machine_cluster.start("registry"))


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_there_and_back(two_machines: tuple[Machine, Machine], registry: str, below: str) -> None:
    """podman's own verbs in place and to the other machine; annotated create brings it back, with other limits."""
    here, there = two_machines
    container = everything.Container(here, below, workload.IMAGE, OPTIONS)
    container.start()
    must_be_held(container)
    container.stop_and_restore_in_place()
    must_be_held(container)
    container.travel(there)
    must_be_held(container)
    container.options += ("--memory=256m", "--pids-limit=50")  # podman takes the last
    container.recreate(f"{registry}/moved/{below}:1", here)
    must_be_held(container, NEW)
    container.remove()


def must_be_held(container: everything.Container, limits: dict[str, str] = LIMITS) -> None:
    """Its limits are in force, in a cgroup of its own."""
    subject = container.subject
    (group,) = {line.strip() for line in subject.cgroups}
    assert subject.id in group
    found = {name: subject.node.read(f"/sys/fs/cgroup{group}/{name}").decode().strip() for name in limits}
    assert found == limits
