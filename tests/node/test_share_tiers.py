# SPDX-License-Identifier: Apache-2.0
"""`cryoci share` with less host memory than its members need: some are on disk or in a registry."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.fakegpu import build
from tests.fakegpu.build import UUIDS
from tests.node import gpu
from tests.node.conftest import Site
from tests.node.gpu import Trainer
from tests.node.subject import KINDS, failing, runs_on
from tests.node.test_share import ask, sharing, states
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node
ONE = build.devices(UUIDS[:1])

# One connection: asks, waits until it is closed, asks again over another one.
_KEEP = """
import http.client, json, sys
c = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
for n in range(2):
    c.request("GET", "/")
    print(json.loads(c.getresponse().read())["count"], flush=True)
    if n == 0:
        print("closed" if c.sock.recv(1) == b"" else "bytes", flush=True)
        c.close()
"""


def tiers(node: NamespaceNode, names: list[str]) -> dict[str, str]:
    """What `cryoci top` says of members."""
    lines = json.loads(node.run(["cryoci", "top", "--json"]).stdout)
    return {line["name"]: line["tier"] for line in lines if line["name"] in names}


def arrived(node: NamespaceNode, turn: dict[str, str]) -> bool:
    """Is every member where `turn` says?"""
    return tiers(node, list(turn)) == turn


def until(true: Callable[[], Any], seconds: float = 40) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def metrics(node: NamespaceNode, port: int) -> str:
    code = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
    return node.run(["python3", "-c", code]).stdout.decode()


def test_three_models_and_room_for_two(site: Site) -> None:
    """GPU, bare: one runs, one is parked, one is on disk; requests move them, and nothing is lost."""
    node = site.a
    gpu.equip(node, ONE)
    models = [Trainer(node, f"model{n}", devices=ONE, mib=4, port=8000).start() for n in range(3)]
    names = [model.name for model in models]
    rows = json.loads(node.run(["cryoci", "ps", "--json"]).stdout)
    limit = int(1.6 * max(row["host"] for row in rows))
    members = [word for n in range(3) for word in ("--member", f"model{n}=900{n}:8000")]
    memory = ["--host-memory", str(limit)]
    count: dict[int, int] = {}

    def serve(number: int) -> None:
        answer = ask(node, 9000 + number)[0][0]
        assert answer["good"] and answer["count"] > count.get(number, 0)
        count[number] = answer["count"]

    with sharing(node, *members, *memory, "--disk", "/srv/parked", "--metrics", "127.0.0.1:9009"):
        until(lambda: sorted(tiers(node, names).values()) == ["disk", "host", "running"])
        for number in range(3):
            serve(number)
        until(lambda: sorted(tiers(node, names).values()) == ["disk", "host", "running"])
        numbers = metrics(node, 9009)
        assert 'cryoci_share_members{tier="disk"} 1' in numbers
        assert 'cryoci_share_tier_moves_total{what="failed"} 0' in numbers
        assert node.sh("ls /srv/parked | wc -l").strip() == "1"
        stored = next(name for name, tier in tiers(node, names).items() if tier == "disk")
        assert stored not in states(node)
    # killed; the next one puts members into the local store, and brings back who is elsewhere
    with sharing(node, *members, "--host-memory", "0"):
        for number in range(3):
            serve(number)
        keeper = node.popen(["python3", "-c", _KEEP, "9000"])
        until(lambda: tiers(node, names)["model0"] == "running")
        serve(1)
        said, _ = keeper.communicate(timeout=60)  # its unused connection was closed when it went
        first, closed, second = said.decode().split()
        assert closed == "closed" and int(second) > int(first)
        until(lambda: sorted(tiers(node, names).values()) == ["disk", "disk", "running"])
        assert "ask at its port" in failing(node, ["cryoci", "unpark", "model2"])
    said = json.loads(node.run(["cryoci", "unpark", "model2", "--json"]).stdout)
    assert said["vram"] == 4 << 20 and states(node)["model2"] == "running"
    with sharing(node, *members):
        for number in range(3):
            serve(number)
    assert node.sh("ls /srv/parked /var/lib/cryoci/share").split() == [
        "/srv/parked:",
        "/var/lib/cryoci/share:",
    ]
    assert json.loads(node.run(["cryoci", "list", "--json"]).stdout) == []
    # a disk that is too small: they stay in host memory, and are served
    node.sh("mkdir /srv/small && mount -t tmpfs -o size=1M none /srv/small")
    with sharing(node, *members, *memory, "--disk", "/srv/small", "--metrics", "127.0.0.1:9009"):
        until(lambda: 'moves_total{what="failed"} 2' in metrics(node, 9009))
        for number in range(3):
            serve(number)
        assert "MiB free" in json.dumps(json.loads(node.run(["cryoci", "top", "--json"]).stdout))
    node.sh("umount /srv/small")
    for model in models:
        node.run(["cryoci", "unpark", model.name], check=False)
        model.remove()


def test_podman_in_a_registry(site: Site) -> None:
    node = site.a
    node.sh("rm -f /etc/cryoci/config.toml")
    one, two = site.subject(KINDS["podman+runc"]), site.subject(KINDS["podman+crun"])
    before = {subject.name: subject.start() for subject in (one, two)}
    members = ["--member", f"{one.name}=9001:8765", "--member", f"{two.name}=9002:8765"]
    # more is to stay free than there is
    words = [*members, "--reserve", "9999G", "--registry", f"{site.registry}/parked"]
    with sharing(node, *words) as daemon:
        for _ in range(2):
            for subject, other, port in ((one, two, 9001), (two, one, 9002)):
                runs_on(before[subject.name], ask(node, port)[0][0])
                turn = {subject.name: "running", other.name: "registry"}
                until(partial(arrived, node, turn))
        stored = one
        assert stored.status == "exited"
        daemon.terminate()
        daemon.wait()
    node.run(["podman", "start", stored.name])  # by hand, and from its beginning: that one counts then
    with sharing(node, *members):
        assert ask(node, 9001)[0][0]["boot"] != before[stored.name]["boot"]
    for subject in (one, two):
        node.run(["cryoci", "unpark", subject.name], check=False)
        subject.remove()


# Keeps connections open, as most model servers do.
_KEEPING = """
import http.server, itertools, json
numbers = itertools.count(1)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = json.dumps({"count": next(numbers)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""


def test_podman_with_an_open_connection(site: Site) -> None:
    """podman 5.4 has no --tcp-close: the runtime below it closes what was severed, and the server answers others."""
    node = site.a
    node.sh("rm -f /etc/cryoci/config.toml")
    run = ["podman", "--runtime=cryoci-runtime", "run", "--detach", "--quiet", "--name=kept"]
    node.run([*run, site.image, "python3", "-c", _KEEPING])
    words = ["--member", "kept=9001:8000", "--idle", "300ms", "--host-memory", "0", "--disk", "/srv/kept"]
    with sharing(node, *words):
        said = node.run(["python3", "-c", _KEEP, "9001"], timeout=60).stdout.decode().split()
        assert said[1] == "closed" and int(said[2]) == int(said[0]) + 1  # one process, before and after
        until(lambda: tiers(node, ["kept"])["kept"] == "disk")
    node.run(["cryoci", "unpark", "kept"])
    assert node.sh("ls /srv/kept") == ""
    node.run(["podman", "rm", "--force", "--time=0", "kept"])
