#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every byte is there again: checkpoints and restores of processes with random memory, many times over.

    python -m bench.memory_proof --rounds 100 --runtime runc crun

Each round starts a container of tests/node/mosaic.py with a seed of its own: areas of random sizes with holes, guard
pages, mixed protections, huge pages, shared and locked ones, absent, zero and full pages; a child that shares most of
it by copy-on-write, and has more of its own; threads that count in a large and a small area at once, and up to 100
that wait in system calls. It is checkpointed and runs on, is checkpointed and ends, is restored. After each, the
sha256 of all its memory must be what it was, the counters must agree and go on, and no journal may be left. Files are
written past the page cache and through it in turns. It stops at the first difference, and names the seed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import sys
import time

from tests.node.test_memory import Mosaic, configure
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode


def once(node: NamespaceNode, kind: str, seed: int) -> tuple[int, int, int]:
    """One round; returns its chunk files, threads, MiB in huge pages. Raises AssertionError when anything differs."""
    dice = random.Random(seed)
    waiting = 98 if seed % 10 == 0 else dice.randrange(8)
    with Mosaic(node, kind, seed, mib=dice.randrange(8, 40), counting=2, waiting=waiting) as mosaic:
        configure(node, kind, "parallel", f'write = "{"direct" if seed % 2 else "buffered"}"')
        pids = node.sh("pgrep -f '^python3 -u /app/mosaic'").split()
        huge = node.sh(f"cat {' '.join(f'/proc/{pid}/smaps_rollup' for pid in pids)} | grep AnonHuge")
        mosaic.checkpoint("--leave-running")
        mosaic.must_be_as_before()
        node.sh(f"rm -r {mosaic.images}")
        mosaic.checkpoint()
        files = len(mosaic.moved())
        mosaic.delete()
        mosaic.restore()
        mosaic.must_be_as_before()
        assert files and mosaic.journal() is None
        kib = sum(int(line.split()[1]) for line in huge.splitlines())
        return files, mosaic.before["parent"]["threads"], kib >> 10


def main() -> int:
    """Run the rounds and print what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--runtime", nargs="+", default=["runc", "crun"], choices=["runc", "crun"])
    parser.add_argument("--seed", type=int, default=1000, help="of the first round")
    args = parser.parse_args()
    print(f"{datetime.date.today()}, Linux {platform.release()}, {os.cpu_count()} CPUs\n")
    print("| runtime | rounds | seeds | as before | chunk files | most threads | MiB in huge pages | s |")
    print("|---|---:|---|---:|---:|---:|---:|---:|", flush=True)
    with Cluster(tag="proof") as cluster:
        node = cluster.start("a", disk=True)
        for kind in args.runtime:
            start, files, threads, huge = time.monotonic(), 0, 0, 0
            for seed in range(args.seed, args.seed + args.rounds):
                try:
                    found = once(node, kind, seed)
                except BaseException:
                    print(f"{kind}, seed {seed}, round {seed - args.seed + 1}: failed", file=sys.stderr)
                    raise
                print(f"{kind} {seed}: as before", file=sys.stderr)
                files, threads, huge = files + found[0], max(threads, found[1]), huge + found[2]
            took = time.monotonic() - start
            seeds = f"{args.seed} to {args.seed + args.rounds - 1}"
            cells = (kind, args.rounds, seeds, args.rounds, files, threads, huge, f"{took:.0f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
