# SPDX-License-Identifier: Apache-2.0
"""Uses, with real services: they share a place, survive a crash, park when idle, and start where one was ready."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.service import POSTGRES, REDIS, Client, Service, goes_on, listening, until
from tests.node.test_guard import guarding, recovered
from tests.node.test_guard import until as guard_until
from tests.node.test_share import sharing, states
from tests.nodes import services, workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def node() -> Iterator[NamespaceNode]:
    """One node for all services."""
    with Cluster(tag="uses") as cluster:
        yield cluster.start("a", shown=services.shown())


def test_two_model_servers_share_a_place(node: NamespaceNode) -> None:
    """Requests to both at once, over connections that stay: none fails, none is answered wrongly."""
    servers = [
        Service(node, "runc", f"model{n}", ("python3", "/data/model_server.py", str(8000 + n)), root=services.PYTHON,
                programs=("model_server.py",))
        for n in (1, 2)
    ]  # fmt: skip
    with servers[0] as one, servers[1] as two:
        listening(one, 8001)
        listening(two, 8002)
        members = ["--member", f"{one.name}=9001:8001", "--member", f"{two.name}=9002:8002"]
        with sharing(node, *members, "--patience", "300ms"):
            with (
                Client(node, "web_client.py", "9001") as first,
                Client(node, "web_client.py", "9002") as second,
            ):
                both = (first, second)
                for client in both:
                    client.ask("load")
                asked = [0, 0]
                for _ in range(3):  # each needs its turn
                    asked = [goes_on(client, before) for client, before in zip(both, asked, strict=True)]
                # one may be on its way out for a moment, while the other is there already
                until(lambda: list(states(node).values()).count("running") <= 1)
                told = [client.ask("stop") for client in both]
            assert [(one["wrong"], one["error"]) for one in told] == [(0, "")] * 2
        for server in servers:
            node.run(["cryoci", "unpark", server.name])


def test_guard_reports_the_work_that_redis_lost(node: NamespaceNode) -> None:
    """Killed under writes: what is back is whole, and ends where the guard says that it does."""
    with Service(node, "runc", "redis", REDIS) as redis:
        until(lambda: redis.execute("redis-cli", "ping"))
        with Client(node, "redis_client.py", "6379") as client:
            client.ask("load")
            words = ("--every", "4s", "--to", "tmpfs", "--rootfs", "none", "--tcp-established")
            with guarding(node, redis.name, *words):
                guard_until(node, redis.name, lambda s: s["taken"] >= 1)
                time.sleep(1)
                goes_on(client, client.ask("info")["written"])
                pid = json.loads(node.run(["cryoci-runtime", "state", redis.name]).stdout)["pid"]
                node.run(["kill", "-KILL", str(pid)])
                (recovery,) = recovered(node, redis.name, 1)["recoveries"]
                found = client.ask("survived")
    assert (found["wrong"], found["first"]) == (0, True)
    assert 0 < found["there"] < found["written"]
    assert abs(recovery["lost"] - found["lost"]) < 0.3, (recovery, found)


def test_a_notebook_server_is_parked_by_its_kernels(node: NamespaceNode) -> None:
    """Not while a cell runs that uses nothing; once it has ended; and a browser brings it back with all variables."""
    node.write("/srv/token", "sesame")
    argv = (
        "python3", "-m", "jupyter_server", "--port=8888", "--ip=127.0.0.1", "--allow-root", "--no-browser",
        "--ServerApp.terminals_enabled=False", "--IdentityProvider.token=sesame", "--ServerApp.root_dir=/data",
    )  # fmt: skip
    with Service(node, "runc", "lab", argv, root=services.PYTHON) as lab:
        listening(lab, 8888)
        started = ask(node, 8888, "POST")
        file = f"/data/.local/share/jupyter/runtime/kernel-{started['id']}.json"
        with Client(node, "kernel_client.py", f"{lab.base}/rootfs{file}") as client:
            client.ask("x = 41")
            words = [
                f"{lab.name}=9001:8888",
                "--jupyter",
                f"{lab.name}=8888",
                "--jupyter-token",
                f"{lab.name}=/srv/token",
            ]
            words += ["--after", "1500ms", "--every", "300ms", "--ignore", "traffic", "--ignore", "cpu"]
            daemon = node.popen(["cryoci", "idle", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            try:
                began = time.monotonic()
                client.ask("begin import time; time.sleep(3)")
                until(lambda: states(node)[lab.name] == "parked" or None)
                assert time.monotonic() - began > 4.5
                (kernel,) = ask(node, 9001, "GET")
                assert kernel["id"] == started["id"] and kernel["execution_state"] == "idle"
                assert client.ask("print(x + 1)")["said"] == "42\n"
            finally:
                daemon.kill()
                print(daemon.communicate()[0].decode())


def ask(node: NamespaceNode, port: int, method: str) -> Any:
    """Ask a notebook server about its kernels, or for a new one."""
    script = """
import sys, urllib.request as u
where, token = f"http://127.0.0.1:{sys.argv[1]}/api/kernels", {"Authorization": "token sesame"}
r = u.Request(where, method=sys.argv[2], headers=token)
print(u.urlopen(r, timeout=30).read().decode())
"""
    return json.loads(node.run(["python3", "-c", script, str(port), method]).stdout)


def test_a_baked_postgres_is_ready_at_once(node: NamespaceNode) -> None:
    """Its data directory is made and its server started once; what comes back takes rows."""
    with Service(node, "runc", "postgres", POSTGRES, programs=("user.c",), started=False) as postgres:
        bake = [
            "cryoci",
            "bake",
            "--json",
            f"--name={postgres.name}",
            "--rootfs=none",
            f"--bundle={postgres.base}",
        ]
        ready = ["--ready-port=5432", "--ready-log=ready to accept connections", "--ready-timeout=60s"]
        baked = json.loads(node.run([*bake, *ready, "-o", "db:1"], timeout=120).stdout)
        assert not node.sh("ss -Htln 'sport = :5432'")
        words = ["cryoci", "restore", "db:1", "--detach", "--bundle", postgres.base]
        workload.detach(node, words, f"{postgres.base}/log")
        with Client(node, "postgres_client.py", "5432") as client:
            client.ask("load")
            goes_on(client, 0)
            client.ask("stop")
            checked = client.ask("check")
        assert (checked["there"], checked["error"]) == (checked["written"], "")
        assert baked["seconds"]["start"] > 0.5
