#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long a server takes to its first answer: started, and restored from wherever its image may lie.

    python -m bench.warm [--mib 256] [--rounds 5] [--timeline DIR] [--before CHECKOUT]     in fresh test nodes (root)

The server is a Python program in podman that imports two hundred modules and computes --mib MiB of tables before it
listens (real work). It is baked on one node. On another, which has its base image, it is started from scratch and
restored in turns: from a registry on a third node; from the local store with nothing of it in the page cache; from the
store in the page cache (`cryoci warm`); unpacked beside the store (`cryoci warm --to unpacked`); from memory (`cryoci
warm --to tmpfs`); from a directory. Time runs from the command to the first answer, which is checked; asking takes
about a tenth of a second of it each time. What runc and CRIU took of it, called as anybody would, is the least that it
can be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

SERVER = """
import array, hashlib, http.server, pkgutil, importlib
names = "asyncio email.mime.text xml.dom.minidom unittest ctypes decimal difflib html.entities logging.handlers \\
multiprocessing pdb pydoc tarfile urllib.request zipfile concurrent.futures statistics doctest".split()
names += ["encodings." + found.name for found in pkgutil.iter_modules(importlib.import_module("encodings").__path__)]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # of other systems, or without its library
tables = []
for number in range(MIB):
    seed = hashlib.sha256(str(number).encode()).digest()
    block = bytearray()
    while len(block) < 1 << 20:
        seed = hashlib.sha256(seed).digest()
        block += seed
    tables.append(bytes(block))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = hashlib.sha256(tables[-1] + tables[0]).hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *words):
        pass
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
_ASK = """
import time, urllib.request
while True:
    try:
        print(urllib.request.urlopen("http://127.0.0.1:8000/", timeout=60).read().decode())
        break
    except OSError:
        time.sleep(0.02)
"""
_FORGET = """
import os, sys
os.sync()
for name in sys.argv[1:]:
    fd = os.open(name, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
"""
NAME = "served"
TIMELINE = "/srv/timeline.json"


class Way:
    """One way to the first answer. `before` is not timed; `argv` is what starts the server, over `launcher`."""

    def __init__(
        self,
        name: str,
        argv: list[str],
        before: Callable[[], object] = lambda: None,
        launcher: str = "/opt/cryoci/lib/python3*/site-packages",
    ) -> None:
        self.name, self.argv, self.before, self.launcher = name, argv, before, launcher
        self.seconds: list[float] = []
        self.steps: dict[str, list[float]] = {}

    def take(self, node: NamespaceNode) -> str:
        """Start, ask, remove; returns the answer."""
        self.before()
        node.sh(f"ln -sfn {self.launcher}/cryoci/shim/launcher.py /usr/local/bin/cryoci-runtime")
        began = time.monotonic()
        said = node.run(self.argv, timeout=600).stdout
        pid = (
            node.run(["podman", "container", "inspect", "--format={{.State.Pid}}", NAME])
            .stdout.decode()
            .strip()
        )
        answer = node.run(["nsenter", "-t", pid, "-n", "python3", "-c", _ASK], timeout=600).stdout.decode()
        self.seconds.append(time.monotonic() - began)
        node.run(["podman", "rm", "--force", "--time=0", NAME])
        if self.argv[0] != "podman":
            value: dict[str, Any] = json.loads(said)
            found = {
                **value["container"]["seconds"],
                "fetch": (value["image"] or {"seconds": 0.0})["seconds"],
            }
            if TIMELINE in self.argv:
                its = json.loads(node.path(TIMELINE).read_text())["steps"]
                found["runtime"] = sum(
                    step["seconds"] for step in its if step["name"].startswith(("runc ", "crun "))
                )
            for step, seconds in found.items():
                self.steps.setdefault(step, []).append(seconds)
        return answer


def copy(checkout: Path, target: Path) -> None:
    """The packages of a checkout, whose rooms are links."""
    shutil.copytree(checkout / "cryoci", target / "cryoci", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256, help="of tables that the server computes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtime", default="cryoci-runtime", help="of podman")
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="a checkout of another cryoci, to compare with"
    )
    parser.add_argument(
        "--timeline", type=Path, metavar="DIR", help="keep a timeline of each way's last round"
    )
    options = parser.parse_args()
    server = SERVER.replace("MIB", str(options.mib))
    with Cluster(tag="bench") as cluster:
        first, node, third = (cluster.start(name) for name in "abc")
        registry = cluster.registry(third)
        base = f"{registry}/counter:1"
        workload.push(third, base)
        for one in (first, node):
            one.run(["podman", "pull", "--quiet", base])
        image = f"{registry}/warm/served:1"
        run = [base, "python3", "-c", server]
        bake = ["cryoci", "bake", "--json", f"--name={NAME}", "--ready-http=http://127.0.0.1:8000/"]
        bake += ["-o", image, f"--podman=--runtime={options.runtime}"]
        baked = json.loads(first.run([*bake, *run], timeout=600).stdout)
        node.run(["cryoci", "warm", image])
        node.run(["cryoci", "pull", image, "/srv/served"])
        restore = ["cryoci", "restore", "--detach", "--json", "--timeline", TIMELINE]
        blobs = sorted(node.sh("ls /var/lib/cryoci/images/blobs/sha256").split())
        paths = [f"/var/lib/cryoci/images/blobs/sha256/{name}" for name in blobs]
        local = "warm/served:1"
        start = ["podman", f"--runtime={options.runtime}", "run", "--detach", "--quiet"]
        forget = ["python3", "-c", _FORGET, *paths]
        ways = [
            Way("started from scratch", [*start, f"--name={NAME}", *run]),
            Way("registry", [*restore, image]),
            Way("store, cold", [*restore, local], lambda: node.run(forget)),
            Way("store, page cache", [*restore, local], lambda: node.run(["cryoci", "warm", local])),
            Way("unpacked", [*restore, local], lambda: node.run(["cryoci", "warm", "--to=unpacked", local])),
            Way("tmpfs", [*restore, local], lambda: node.run(["cryoci", "warm", "--to=tmpfs", local])),
            Way("directory", [*restore, "/srv/served"]),
        ]
        if options.before:
            copy(options.before, node.path("/srv/before"))
            python = node.sh("sed -n '1s/^#!//p' \"$(command -v cryoci)\"").strip()
            other = ["env", "PYTHONPATH=/srv/before", python, "-m", "cryoci.cli.main", *restore[1:], local]
            warm: Callable[[], object] = lambda: node.run(["cryoci", "warm", local])  # noqa: E731
            ways.append(Way("page cache, before", other, warm, "/srv/before"))
            other = [*other[:-1], "/srv/served"]
            ways.append(Way("directory, before", other, launcher="/srv/before"))
        answers = set()
        for number in range(options.rounds):
            for way in ways:
                if options.timeline and number == options.rounds - 1 and way.argv[0] == "cryoci":
                    way.argv = ["/srv/timeline.html" if word == TIMELINE else word for word in way.argv]
                answers.add(way.take(node))
                if "/srv/timeline.html" in way.argv:
                    options.timeline.mkdir(parents=True, exist_ok=True)
                    page = node.path("/srv/timeline.html").read_text()
                    (options.timeline / f"{way.name.replace(', ', '-').replace(' ', '-')}.html").write_text(
                        page
                    )
                if way.name in ("unpacked", "tmpfs"):
                    node.run(["cryoci", "warm", "--drop"])
        if len(answers) != 1:
            raise SystemExit(f"the servers gave {len(answers)} different answers")
    raw, size = baked["image"]["raw_size"] / 1e6, baked["image"]["size"] / 1e6
    print(
        f"{options.rounds} rounds; checkpoint of {raw:.0f} MB, image of {size:.0f} MB; Python "
        f"{platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    print("| | first answer, s | worst | of a start | fetch, s | restore, s | of it runc and CRIU, s |")
    print("|---|" + "---:|" * 6)
    scratch = statistics.median(ways[0].seconds)
    for way in ways:
        took = statistics.median(way.seconds)
        steps = [
            f"{statistics.median(way.steps[name]):.2f}" if name in way.steps else ""
            for name in ("fetch", "restore", "runtime")
        ]
        print(
            f"| {way.name} | **{took:.2f}** | {max(way.seconds):.2f} | {took / scratch:.2f} | {' | '.join(steps)} |"
        )


if __name__ == "__main__":
    main()
