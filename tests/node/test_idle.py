# SPDX-License-Identifier: Apache-2.0
"""`cryoci idle`: a real server is parked when nobody asks, and serves who comes for it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, Subject, failing, runs_on
from tests.node.test_share import ask, states
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node


def watching(node: NamespaceNode, *words: str) -> subprocess.Popen[bytes]:
    """`cryoci idle` that listens at port 9001."""
    process = node.popen(["cryoci", "idle", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    await_true(lambda: ":9001 " in node.sh("ss -Hltn"), process)
    return process


def await_true(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 40
    while not true():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


def status(node: NamespaceNode, subject: Subject) -> dict[str, Any]:
    found = json.loads(node.run(["cryoci", "idle", "status", subject.name, "--json"]).stdout)[0]
    assert isinstance(found, dict)
    return found


def test_parked_when_idle_and_back_for_a_client(site: Site) -> None:
    node, subject = site.a, site.subject(KINDS["podman+runc"])
    before = subject.start()
    # the counter computes for ever: its CPU time would be use
    words = (f"{subject.name}=9001:8765", "--after", "3s", "--every", "500ms", "--ignore", "cpu")
    process = watching(node, *words)
    try:
        for _ in range(5):  # who asks past the proxy is seen as well
            subject.ask()
            time.sleep(0.7)
            assert states(node)[subject.name] == "running"
        await_true(lambda: states(node)[subject.name] == "parked", process)
        answers, _ = ask(node, 9001)
        runs_on(before, answers[0])
        assert "watched already" in failing(node, ["cryoci", "idle", subject.name])
        await_true(lambda: states(node)[subject.name] == "parked", process)
        process.kill()  # nobody is harmed, and the next one knows who is parked
        process.wait()
        process = watching(node, *words)
        assert states(node)[subject.name] == "parked"
        node.run(["cryoci", "unpark", subject.name])  # by hand: it is noticed, and has its time
        await_true(lambda: status(node, subject)["state"]["state"] == "running", process)
        await_true(lambda: status(node, subject)["state"]["state"] == "parked", process)
        assert status(node, subject)["alive"] and status(node, subject)["state"]["parks"] >= 2
        runs_on(before, ask(node, 9001)[0][0])
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            print(process.stdout.read().decode())
    subject.remove()
