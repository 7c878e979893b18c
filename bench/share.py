#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long a client waits for a parked server, against a cold start of it; and a soak of the daemon.

    python -m bench.share [--rounds 500]          in a fresh test node (root)

Two servers that must compute their model before they listen share one place (`cryoci share`). Requests go to one and
the other in turn, so each brings one in and the other out. Prints a markdown table of the first answer's time, and
what the daemon holds (memory, descriptors, threads) as the rounds go by. Every answer is compared with the first.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

SERVER = """
import hashlib, http.server, os
model = hashlib.pbkdf2_hmac("sha256", b"model", b"salt", 8_000_000)
boot = os.urandom(8).hex()
class Model(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{model.hex()} {boot}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("", 8000), Model).serve_forever()
"""


# Runs inside the node: for each port that it reads, the answer and the seconds that it took.
CLIENT = """
import sys, time, urllib.request
for line in sys.stdin:
    began = time.monotonic()
    try:
        said = urllib.request.urlopen(f"http://127.0.0.1:{line.strip()}/", timeout=60).read().decode()
    except OSError:
        said = ""
    print(time.monotonic() - began, said, flush=True)
"""


class Client:
    """A client on `node`."""

    def __init__(self, node: NamespaceNode) -> None:
        self._process = node.popen(
            ["python3", "-u", "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, port: int) -> tuple[str, float]:
        """The answer at a port, "" without one, and the seconds that it took."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{port}\n".encode())
        self._process.stdin.flush()
        seconds, _, said = self._process.stdout.readline().decode().strip().partition(" ")
        return said, float(seconds)


def holds(node: NamespaceNode, pid: int) -> tuple[int, int, int]:
    """MiB of memory, descriptors and threads of a process of the node."""
    status = node.read(f"/proc/{pid}/status").decode()
    field = dict(line.split(":\t", 1) for line in status.splitlines())
    return (
        int(field["VmRSS"].split()[0]) >> 10,
        len(node.sh(f"ls /proc/{pid}/fd").split()),
        int(field["Threads"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=500)
    options = parser.parse_args()
    with Cluster(tag="bench") as cluster:
        node = cluster.start("node")
        workload.load(node)
        client, cold = Client(node), []
        for name, port in (("one", 9001), ("two", 9002)):
            began = time.monotonic()
            node.run([
                "podman", "run", "--detach", "--quiet", "--network=host", f"--name={name}", workload.IMAGE,
                "python3", "-u", "-c", SERVER.replace("8000", str(port + 100)),
            ])  # fmt: skip
            while not client.ask(port + 100)[0]:
                time.sleep(0.01)
            cold.append(time.monotonic() - began)
        daemon = node.popen(
            ["cryoci", "share", "--member", "one=9001:9101", "--member", "two=9002:9102"],
            stdout=subprocess.DEVNULL,
        )
        while ":9002 " not in node.sh("ss -Hltn"):
            time.sleep(0.1)
        pid = int(node.sh("pgrep -f '/cryoci share'").split()[0])
        first = {port: client.ask(port)[0] for port in (9001, 9002)}
        waits, table = [], []
        for number in range(options.rounds):
            for port in (9001, 9002):
                answer, wait = client.ask(port)
                if answer != first[port]:
                    raise SystemExit(f"round {number}: another answer")
                waits.append(wait)
            if number % max(1, options.rounds // 5) == 0 or number == options.rounds - 1:
                table.append((number + 1, *holds(node, pid)))
        daemon.kill()
        daemon.wait()
        waits.sort()
        print(
            f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} cores, "
            f"load {os.getloadavg()[0]:.1f}\n"
        )
        print("| first answer | s |\n|---|---:|")
        print(f"| cold start, median of 2 | {statistics.median(cold):.2f} |")
        print(f"| brought in, median of {len(waits)} | **{statistics.median(waits):.3f}** |")
        print(f"| brought in, 95th percentile | {waits[len(waits) * 95 // 100]:.3f} |")
        print(f"| brought in, longest | {waits[-1]:.3f} |")
        print("\n| after round | memory, MiB | descriptors | threads |\n|---:|---:|---:|---:|")
        for row in table:
            print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
