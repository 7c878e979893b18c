# SPDX-License-Identifier: Apache-2.0
"""Real services through checkpoint and restore on their node, by CRIU alone and with memory out of band.

Each goes through both engines in turn, so the second checkpoint is of a container that was restored already.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.service import Client, Service, until
from tests.nodes import services
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

ENGINES = ("parallel", "criu", "parallel")
both = pytest.mark.parametrize("kind", ["runc", "crun"])


@pytest.fixture(scope="module")
def node() -> Iterator[NamespaceNode]:
    """One node for all services."""
    with Cluster(tag="services") as cluster:
        yield cluster.start("a", shown=services.shown())


REDIS = (
    "redis-server", "--port", "6379", "--save", "", "--enable-debug-command", "local", "--daemonize", "no",
)  # fmt: skip


def goes_on(client: Client, written: int) -> int:
    """Wait until 100 writes more than `written` were acknowledged; returns how many were."""

    def more() -> int | None:
        now: int = client.ask("info")["written"]
        return now if now > written + 100 else None

    found: int = until(more)
    return found


@both
def test_redis_under_load_loses_no_acknowledged_write(node: NamespaceNode, kind: str) -> None:
    with Service(node, kind, "redis", REDIS) as redis:
        until(lambda: redis.execute("redis-cli", "ping"))
        redis.execute("redis-cli", "debug", "populate", "100000", "key", "700")
        with Client(node, "redis_client.py", "6379") as client:
            digest = client.ask("digest")
            client.ask("load")
            for engine in ENGINES:
                written = goes_on(client, 0)
                moved = redis.checkpoint(engine)
                assert engine == "criu" or moved >= 70
                redis.restore()
                goes_on(client, written)
            client.ask("stop")
            checked = client.ask("check")
            assert (checked["wrong"], checked["error"]) == (0, "")
            assert checked["written"] > 300
            quiet = client.ask("digest")
            assert quiet != digest
            redis.checkpoint("parallel")
            redis.restore()
            assert client.ask("digest") == quiet
