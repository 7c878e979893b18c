#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the 2nd to 5th checkpoint of a process writes, sends and takes when it changes a part of its memory.

    python -m bench.incremental [--mib 512] [--chunk 8M] [--changes 1 10 50]          in a fresh test node (root)

One process of bare runc holds MIB of noise. Before each checkpoint it writes to so many percent of its pages: all in
one place ("together"), or spread evenly ("apart"), which is the worst case for chunks. Each way takes a first
checkpoint, which does not count, and four more with --leave-running; the medians of those are told. Ways: whole and
incremental checkpoints into directories and into a registry on the same node, and CRIU's own memory tracking
(`runc checkpoint --pre-dump`, then --parent-path) where the kernel has it. The process tells the sha256 of its memory
at the end, and the last incremental checkpoint of each kind is restored and must tell the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

HOLDER = """
import hashlib, mmap, os, time
size = {mib} << 20
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, 1 << 20):
    memory[at : at + (1 << 20)] = os.urandom(1 << 20)
asked = at = 0
while True:
    try:
        percent, how = open(f"/data/ask.{{asked}}").read().split()
    except (OSError, ValueError):
        time.sleep(0.01)
        continue
    pages = size // 4096
    count = pages * int(percent) // 100
    if how == "tell":
        told = hashlib.sha256(memory).hexdigest()
    else:
        for n in range(count):
            page = (at + (n if how == "together" else n * pages // count)) % pages
            memory[page * 4096 : page * 4096 + 16] = os.urandom(16)
        at += count if how == "together" else 1
        told = "done"
    with open("/data/new", "w") as f:
        f.write(told)
    os.rename("/data/new", f"/data/told.{{asked}}")
    asked += 1
"""
CONFIG = '[memory]\nengine = "{engine}"\nthreshold = "1M"\nchunk = "{chunk}"\n'
ROUNDS = 5
NAME, BASE = "bench-incremental", "/srv/bench-incremental"


@dataclass(frozen=True)
class Cost:
    """Of one checkpoint: bytes that went to a disk or registry, seconds in all, and those of the pause."""

    moved: int
    seconds: float
    pause: float


class Subject:
    """The process."""

    def __init__(self, node: NamespaceNode, mib: int) -> None:
        self.node, self.asked = node, 0
        spec = workload.bundle(node, BASE)
        node.write(f"{BASE}/rootfs/app/holder.py", HOLDER.format(mib=mib))
        spec["process"]["args"] = ["python3", "-u", "/app/holder.py"]
        node.write(f"{BASE}/config.json", json.dumps(spec))
        workload.detach(node, ["cryoci-runtime", "run", "-d", "-b", BASE, NAME], f"{BASE}/log")
        self.ask(0, "together")

    def ask(self, percent: int, how: str) -> str:
        self.node.write(f"{BASE}/rootfs/data/ask.{self.asked}", f"{percent} {how}")
        path = self.node.path(f"{BASE}/rootfs/data/told.{self.asked}")
        while not path.exists():
            time.sleep(0.01)
        self.asked += 1
        return path.read_text()

    def end(self) -> None:
        self.node.run(["cryoci-runtime", "delete", "-f", NAME], check=False)

    def restore(self, source: str) -> None:
        argv = ["cryoci", "restore", source, "-d", "--bundle", BASE]
        workload.detach(self.node, argv, f"{BASE}/log")


def cryoci(node: NamespaceNode, target: str, *words: str) -> tuple[dict[str, Any], float]:
    argv = ["cryoci", "checkpoint", NAME, "-R", "--rootfs=none", "--json", "-o", target, *words]
    began = time.perf_counter()
    report: dict[str, Any] = json.loads(node.run(argv, timeout=600).stdout)
    return report, time.perf_counter() - began


def directory(node: NamespaceNode, number: int, *words: str) -> Cost:
    target = f"/srv/out/{number}"
    report, seconds = cryoci(node, target, *words)
    size = int(node.sh(f"du -sb --apparent-size {target} | cut -f1"))
    moved = report["files"]["new"] if words else size
    return Cost(moved, seconds, sum(report["seconds"].values()))


def registry(node: NamespaceNode, number: int, place: str, *words: str) -> Cost:
    report, seconds = cryoci(node, f"{place}:{number}", *words)
    found = report["image"]
    return Cost(found["size"] - found["shared"], seconds, sum(report["seconds"].values()))


def tracked(node: NamespaceNode, number: int) -> Cost:
    """CRIU's own: each is a dump whose unchanged pages are in the one before."""
    parent = ["--parent-path", f"../{number - 1}"] if number else []
    node.sh("mkdir -p /srv/out")
    argv = ["runc", "checkpoint", "--leave-running", "--image-path", f"/srv/out/{number}", *parent]
    if number < ROUNDS - 1:
        argv = [*argv[:2], "--pre-dump", *argv[2:]]
    began = time.perf_counter()
    node.run([*argv, NAME], timeout=600)
    seconds = time.perf_counter() - began
    return Cost(int(node.sh(f"du -sb /srv/out/{number} | cut -f1")), seconds, seconds)


def measure(node: NamespaceNode, place: str, args: argparse.Namespace) -> None:
    """Print the table."""
    tracks = node.run(["criu", "check", "--feature", "mem_dirty_track"], check=False).returncode == 0
    ways: dict[str, Callable[[int], Cost]] = {
        "directory": lambda n: directory(node, n),
        "directory, incremental": lambda n: directory(node, n, "--incremental"),
        "registry": lambda n: registry(node, n, f"{place}/whole"),
        "registry, incremental": lambda n: registry(node, n, f"{place}/shared", "--incremental"),
    }
    if tracks:
        ways["CRIU, memory tracking"] = lambda n: tracked(node, n)
    print("| changed | where | checkpoint | MB moved | seconds | pause, s |")
    print("|---:|---|---|---:|---:|---:|")
    for percent in args.changes:
        for how in ("together", "apart"):
            for way, take in ways.items():
                engine = "criu" if way.startswith("CRIU") else "parallel"
                node.write("/etc/cryoci/config.toml", CONFIG.format(engine=engine, chunk=args.chunk))
                subject = Subject(node, args.mib)
                costs = []
                for number in range(ROUNDS):
                    if number:
                        subject.ask(percent, how)
                    costs.append(take(number))
                told = subject.ask(0, "tell")
                subject.end()
                if "incremental" in way:
                    last = f"{place}/shared:{ROUNDS - 1}" if "registry" in way else f"/srv/out/{ROUNDS - 1}"
                    subject.restore(last)
                    assert subject.ask(0, "tell") == told, "memory differs"
                    subject.end()
                node.sh(f"rm -rf /srv/out {BASE}")
                rest = costs[1:]
                moved, seconds, pause = (
                    statistics.median(values)
                    for values in zip(*((c.moved, c.seconds, c.pause) for c in rest), strict=True)
                )
                row = f"| {percent} % | {how} | {way} | {moved / 1e6:.1f} | {seconds:.2f} | {pause:.2f} |"
                print(row, flush=True)
    if not tracks:
        print(
            "\nThis kernel does not track which pages are written (CONFIG_MEM_SOFT_DIRTY): no rows of CRIU's own."
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--chunk", default="8M")
    parser.add_argument("--changes", type=int, nargs="+", default=[1, 10, 50])
    args = parser.parse_args()
    print(
        f"{args.mib} MiB of noise, chunks of {args.chunk}; runc, Linux {platform.release()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    with Cluster(tag="incremental") as cluster:
        node = cluster.start("a", disk=True)
        place = cluster.registry(node)
        measure(node, f"{place}/bench", args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
