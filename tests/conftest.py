# SPDX-License-Identifier: Apache-2.0
"""Fixtures that start test nodes, and why a test is skipped where there can be none.

Namespace nodes start in 0.1 s, so every test has its own. Machines boot in 10 s: one pair for a module.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.nodes import host
from tests.nodes.cluster import Cluster
from tests.nodes.machine import Machine
from tests.nodes.namespace import NamespaceNode

_MACHINES = {"machine", "two_machines", "machine_cluster"}


# A shell without job control starts what follows "&" with SIGINT ignored, and every child would inherit that: what
# tests tell to end by SIGINT would not.
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """All cells of the matrices, where `make test` takes a part: docs/tests.md."""
    parser.addoption("--all-cells", action="store_true", help="run the tests marked `more` as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what uses nodes, and leave out what `more` marks. A file has one machine: run them with --dist loadfile."""
    if not config.getoption("--all-cells"):
        more = [item for item in items if item.get_closest_marker("more")]
        config.hook.pytest_deselected(items=more)
        items[:] = [item for item in items if not item.get_closest_marker("more")]
    for item in items:
        used = set(getattr(item, "fixturenames", ()))
        if used & _MACHINES or item.get_closest_marker("machine"):
            item.add_marker(pytest.mark.machine)
            item.add_marker(pytest.mark.timeout(900))  # emulated, and the host may be busy with the rest
        elif "cluster" in used:
            item.add_marker(pytest.mark.node)
        marked = item.get_closest_marker("node") or item.get_closest_marker("machine")
        if marked and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="test nodes need root"))


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """An empty cluster; after the test it is closed, and must have left nothing."""
    with Cluster(tag="test") as made:
        yield made
    assert host.leftovers(made.id) == []


@pytest.fixture
def node(cluster: Cluster) -> NamespaceNode:
    """One namespace node."""
    return cluster.start("node")


@pytest.fixture
def two_nodes(cluster: Cluster) -> tuple[NamespaceNode, NamespaceNode]:
    """Two namespace nodes on one network."""
    return cluster.start("a"), cluster.start("b")


@pytest.fixture
def registry(cluster: Cluster) -> str:
    """ "ADDRESS:PORT" of a plain HTTP registry on a node of its own."""
    return cluster.registry(cluster.start("registry"))


@pytest.fixture(scope="module")
def machine_cluster() -> Iterator[Cluster]:
    """A cluster for the machines of a module."""
    with Cluster(tag="machines") as made:
        yield made
    assert host.leftovers(made.id) == []


@pytest.fixture(scope="module")
def machine(machine_cluster: Cluster) -> Machine:
    """One booted machine, shared by the tests of a module."""
    return machine_cluster.machine("machine")


@pytest.fixture(scope="module")
def two_machines(machine_cluster: Cluster) -> tuple[Machine, Machine]:
    """Two booted machines on one network, shared by the tests of a module."""
    first = machine_cluster.machine("first", wait=False)
    second = machine_cluster.machine("second")
    first.wait()
    return first, second
