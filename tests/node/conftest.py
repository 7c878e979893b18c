# SPDX-License-Identifier: Apache-2.0
"""Two nodes and a registry for all tests of a module: each test uses containers of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.node.subject import Kind, Subject
from tests.nodes import host, workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Site:
    """Nodes `a` and `b`, and `c` with the registry at `registry`, which holds the counter as `image`."""

    cluster: Cluster
    a: NamespaceNode
    b: NamespaceNode
    c: NamespaceNode
    registry: str
    image: str

    def subject(self, kind: Kind) -> Subject:
        """A container that does not run yet, on node a, with a name that nothing else has."""
        return Subject(self.a, kind, f"c{next(_numbers)}", self.image)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The shared nodes of a module."""
    with Cluster(tag="site") as cluster:
        a, b, c = (cluster.start(name) for name in "abc")
        registry = cluster.registry(c)
        image = f"{registry}/counter:1"
        workload.push(c, image)
        a.run(["podman", "pull", "--quiet", image])  # b finds it by its digest when it needs it
        yield Site(cluster, a, b, c, registry, image)
    assert host.leftovers(cluster.id) == []
