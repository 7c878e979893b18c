# SPDX-License-Identifier: Apache-2.0
"""Real services through checkpoint and restore on their node, by CRIU alone and with memory out of band.

Each goes through both engines in turn, so the second checkpoint is of a container that was restored already.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.service import POSTGRES, POSTGRES_READY, REDIS, Client, Service, goes_on, listening, until
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


def served(service: Service, program: str, port: int, *, least: int) -> None:
    """A web service under load: no request fails, and no answer is another than before."""
    with Client(service.node, program, str(port)) as client:
        client.ask("load")
        for engine in ENGINES[:2]:
            asked = goes_on(client, 0)
            moved = service.checkpoint(engine)
            assert engine == "criu" or moved >= least
            service.restore()
            goes_on(client, asked)
        told = client.ask("stop")
        assert (told["wrong"], told["error"]) == (0, "")


@both
def test_postgres_under_load_loses_no_committed_row(node: NamespaceNode, kind: str) -> None:
    """And a transaction that is open meanwhile goes on; its rows are sorted in memory that moves out of band."""
    with Service(node, kind, "postgres", POSTGRES, programs=("user.c",)) as postgres:
        listening(postgres, 5432)
        until(lambda: "accepting" in postgres.execute(*POSTGRES_READY) or None)
        with Client(node, "postgres_client.py", "5432") as client:
            client.ask("sort")
            client.ask("load")
            for engine in ENGINES:
                written = goes_on(client, 0)
                moved = postgres.checkpoint(engine)
                assert engine == "criu" or moved >= 20
                postgres.restore()
                goes_on(client, written)
            assert client.ask("rest")["sorted"]
            client.ask("stop")
            checked = client.ask("check")
            assert (checked["there"], checked["error"]) == (checked["written"], "")


@both
def test_node_js_under_load(node: NamespaceNode, kind: str) -> None:
    argv = ("node", "/data/web_server.js", "8000")
    with Service(node, kind, "nodejs", argv, programs=("web_server.js",)) as server:
        listening(server, 8000)
        served(server, "web_client.py", 8000, least=40)


def test_a_model_server_of_python_under_load(node: NamespaceNode) -> None:
    argv = ("python3", "/data/model_server.py", "8001")
    programs = ("model_server.py",)
    with Service(node, "runc", "model", argv, root=services.PYTHON, programs=programs) as server:
        listening(server, 8001)
        served(server, "web_client.py", 8001, least=30)


def test_a_jupyter_kernel_keeps_its_variables_and_its_running_cell(node: NamespaceNode) -> None:
    argv = ("python3", "-m", "ipykernel_launcher", "-f", "/data/kernel.json")
    with (
        Service(node, "runc", "jupyter", argv, root=services.PYTHON) as kernel,
        Client(node, "kernel_client.py", f"{kernel.base}/rootfs/data/kernel.json") as client,
    ):
        digest = "hashlib.sha256(x).hexdigest()"
        told = client.ask(f"import hashlib, os, time; x = os.urandom(40 << 20); print({digest})")["said"]
        assert len(told) == 65
        for n, engine in enumerate(ENGINES[:2]):
            client.ask(f"begin [time.sleep(0.01) for _ in range(100)]; print('cell', {n})")
            moved = kernel.checkpoint(engine)
            assert engine == "criu" or moved >= 40
            kernel.restore()
            answer = client.ask(f"print({digest})")
            assert answer == {"before": f"cell {n}\n", "said": told}
