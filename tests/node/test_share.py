# SPDX-License-Identifier: Apache-2.0
"""`cryoci share` and `swap`: real servers that take turns, and clients that never notice."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, Subject, failing, runs_on
from tests.node.test_app_hooks import noted
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

# Asks a server many times over new connections; prints answers and the longest wait.
_ASK = """
import json, sys, time, urllib.request
out, worst = [], 0
for _ in range(int(sys.argv[2])):
    began = time.monotonic()
    out.append(json.loads(urllib.request.urlopen(sys.argv[1], timeout=60).read()))
    worst = max(worst, time.monotonic() - began)
print(json.dumps([out, worst]))
"""
# Keeps one connection, and asks again over it after a pause.
_KEEP = """
import http.client, sys, time
c = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
for _ in range(2):
    c.request("GET", "/slow")
    print(c.getresponse().read().decode(), flush=True)
    time.sleep(0.5)
"""
SLOW = """
import http.server, time
class Slow(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_GET(self):
        for _ in range(15):
            time.sleep(0.1)
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"slow")
http.server.ThreadingHTTPServer(("", 8765), Slow).serve_forever()
"""


def ask(node: NamespaceNode, port: int, times: int = 1) -> tuple[list[dict[str, Any]], float]:
    """Answers of a member through the proxy, and the longest wait for one in seconds."""
    argv = ["python3", "-c", _ASK, f"http://127.0.0.1:{port}/", str(times)]
    answers, worst = json.loads(node.run(argv, timeout=120).stdout)
    return answers, worst


@contextmanager
def sharing(node: NamespaceNode, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The daemon, once it listens, for the time of a with block."""
    process = node.popen(["cryoci", "share", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ports = [word.rpartition("=")[2].partition(":")[0] for word in words if "=" in word]
    end = time.monotonic() + 20
    while any(f":{port} " not in node.sh("ss -Hltn") for port in ports):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            print(process.stdout.read().decode())
            process.stdout.close()


def states(node: NamespaceNode) -> dict[str, str]:
    """What `cryoci ps` says."""
    return {row["name"]: row["state"] for row in json.loads(node.run(["cryoci", "ps", "--json"]).stdout)}


def test_two_servers_take_turns(site: Site) -> None:
    node = site.a
    one, two = site.subject(KINDS["podman+runc"]), site.subject(KINDS["podman+crun"])
    before = {one.name: one.start(options=noted()), two.name: two.start()}
    members = ["--member", f"{one.name}=9001:8765", "--member", f"{two.name}=9002:8765"]
    with sharing(node, *members, "--metrics", "127.0.0.1:9003"):
        assert list(states(node).values()).count("running") == 1  # the surplus was parked
        for _ in range(2):
            for subject, port in ((one, 9001), (two, 9002)):
                answers, _ = ask(node, port, 3)
                assert {answer["boot"] for answer in answers} == {before[subject.name]["boot"]}
                assert states(node)[subject.name] == "running"
        with ThreadPoolExecutor(2) as both:  # at once, with no request refused
            results = list(both.map(lambda port: ask(node, port, 10), (9001, 9002)))
        for subject, (answers, worst) in zip((one, two), results, strict=True):
            assert len(answers) == 10 and worst < 20
            runs_on(before[subject.name], answers[-1])
        argv = [
            "python3",
            "-c",
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9003/metrics').read().decode())",
        ]
        numbers = node.run(argv).stdout.decode()
        assert f'cryoci_share_failures_total{{member="{one.name}"}} 0' in numbers
        assert list(states(node).values()).count("running") == 1
    # killed, and started again: nobody was harmed
    with sharing(node, *members):
        for subject, port in ((one, 9001), (two, 9002)):
            answers, _ = ask(node, port)
            runs_on(before[subject.name], answers[0])
    running, parked = (one, two) if states(node)[one.name] == "running" else (two, one)
    node.run(["cryoci", "swap", running.name, parked.name])
    assert states(node) == {running.name: "parked", parked.name: "running"}
    assert "the same container" in failing(node, ["cryoci", "swap", one.name, one.name])
    node.run(["cryoci", "unpark", running.name])
    assert one.has("/data/awake") and not one.has("/data/asleep")  # its app hooks were done each time
    for subject in (one, two):
        runs_on(before[subject.name], subject.wait(before[subject.name]["count"] + 1))
        subject.remove()


def test_an_answer_that_is_owed_comes(site: Site) -> None:
    """A member that is parked in the middle of an answer gets its turn again; idle ones are parked."""
    node = site.a
    fast = site.subject(KINDS["podman+runc"])
    fast.start()
    slow = Subject(node, KINDS["podman+runc"], "slow")
    node.run(["podman", "run", "-d", "-q", "--name=slow", site.image, "python3", "-u", "-c", SLOW])
    words = ["--member", "slow=9001:8765", "--member", f"{fast.name}=9002:8765", "--patience", "300ms"]
    with sharing(node, *words, "--idle", "1s"):
        keeper = node.popen(["python3", "-c", _KEEP, "9001"], stdout=subprocess.PIPE)
        time.sleep(0.7)
        for _ in range(3):
            _, worst = ask(node, 9002)  # it does not wait for the slow one to end
            assert worst < 15
            time.sleep(0.5)
        said, _ = keeper.communicate(timeout=60)
        assert said.decode().split() == ["slow", "slow"]
        end = time.monotonic() + 20
        while "running" in states(node).values():
            assert time.monotonic() < end
            time.sleep(0.2)
        assert len(ask(node, 9002)[0]) == 1
    for subject in (slow, fast):
        node.run(["cryoci", "unpark", subject.name])
        subject.remove()


def test_wrong_words(site: Site) -> None:
    assert "no container" in failing(site.a, ["cryoci", "share", "--member", "nobody=9001:80"])
    for words in (
        ["web"],
        ["web=1:0"],
        ["web=80:80", "--member", "web=81:80"],
        ["a=80:1", "--member", "b=80:1"],
    ):
        failing(site.a, ["cryoci", "share", "--member", *words])
