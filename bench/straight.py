#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint needs on its node, with a copy in a scratch directory and straight into the registry.

    python -m bench.straight [--mib 512 1024] [--budgets 64M 256M]          (root; it starts test nodes)

A container of bare runc holds MIB of memory, half noise and half text. It is checkpointed with --leave-running into a
registry on another node, over the copy and straight with each budget. While that runs, the node is looked at every 10
ms: bytes in the scratch directory, of chunks in memory (memfd), and resident in cryoci and cryoci-runtime. The most
of each is told. The container tells the sha256 of its memory after each, which must be as before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path

from tests.node.test_memory_straight import Large, checkpoint
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

SCRATCH = "/var/lib/cryoci/tmp"
CONFIG = '[runtime]\npath = "runc"\n[memory]\nengine = "parallel"\n'
WORDS = (b"bin/cryoci", b"launcher.py")


class Watch:
    """The most that the programs of cryoci on `node` take of anything, for a with block."""

    def __init__(self, node: NamespaceNode) -> None:
        self.scratch = self.flight = self.resident = 0
        self._node, self._ended = node, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        space = os.readlink(f"/proc/{self._node.pid}/ns/pid")
        while not self._ended.wait(0.01):
            resident, flight = 0, dict[tuple[int, int], int]()
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if not any(word in (process / "cmdline").read_bytes() for word in WORDS):
                        continue
                    if os.readlink(process / "ns/pid") != space:
                        continue
                    resident += int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                    for fd in (process / "fd").iterdir():
                        with contextlib.suppress(OSError):
                            if os.readlink(fd).startswith("/memfd:cryoci-memory"):
                                info = fd.stat()
                                flight[info.st_dev, info.st_ino] = info.st_blocks * 512
            self.resident = max(self.resident, resident)
            self.flight = max(self.flight, sum(flight.values()))
            self.scratch = max(self.scratch, _size(self._node.path(SCRATCH)))


def _size(top: Path) -> int:
    total = 0
    for folder, _, names in os.walk(top):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


def measure(node: NamespaceNode, registry: str, mib: int, budgets: list[str]) -> None:
    """Print a row for each way."""
    with Large(node, "runc", 1, mib=mib // 2) as subject:
        node.write("/etc/cryoci/config.toml", CONFIG)
        ways = {"copy": list[str](), **{b: ["--memory-option", f"budget={b}"] for b in budgets}}
        for number, (way, words) in enumerate(ways.items()):
            argv = checkpoint(subject, f"{registry}/bench/{mib}:{number}", "-R", "--json", *words)
            if way == "copy":
                argv.remove("--straight")
            began = time.monotonic()
            with Watch(node) as seen:
                report = json.loads(node.run(argv, timeout=600).stdout)
            seconds = time.monotonic() - began
            subject.must_be_as_before()
            pause = sum(report["seconds"].values())
            name = "over a copy" if way == "copy" else f"straight, budget {way}"
            numbers = (seen.scratch, seen.flight, seen.resident)
            cells = " | ".join(f"{one / 2**20:.0f}" for one in numbers)
            print(f"| {mib} | {name} | {cells} | {seconds:.1f} | {pause:.1f} |", flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--budgets", nargs="+", default=["64M", "256M"])
    args = parser.parse_args()
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"runc, Linux {platform.release()}, {load}; MiB and seconds\n")
    print("| memory | how | scratch | chunks in memory | resident | seconds | pause |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    with Cluster(tag="straight") as cluster:
        node, other = cluster.start("a"), cluster.start("c")
        registry = cluster.registry(other)
        for mib in args.mib:
            measure(node, registry, mib, args.budgets)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
