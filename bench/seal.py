#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What encryption and verification cost: push and pull of a real CRIU image, with and without, in one run.

    python -m bench.seal                  in a fresh test node (root), on a dump made there

The contenders take turns, round by round, each push at an empty registry. Prints markdown tables of seconds,
CPU and peak memory, each row compared with the first.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path

from bench.push_image import CK, REGISTRY, WORK, Tool, measure, prepare
from tests.nodes.cluster import Cluster

PUSH = f"cryoci push -q {CK} {REGISTRY}/bench/image:1"
SEAL = f"--encrypt-to {WORK}/recipient"
SIGN = f"CRYOCI_KEY_PASSWORD=pw cryoci sign -q -k {WORK}/k.key {REGISTRY}"
POLICY = "/etc/cryoci/policy.toml"
STRICT = f"""mkdir -p /etc/cryoci && cat >{POLICY} <<END
mode = "strict"
[[rule]]
match = "{REGISTRY}/bench/*"
keys = ["{WORK}/k.pub"]
provenance = true
END"""

PUSHERS = (
    Tool("push", PUSH),
    Tool("push, encrypted", f"{PUSH} {SEAL}"),
    Tool("push, encrypted, then signed", f"{PUSH} {SEAL} && {SIGN}/bench/image:1"),
    Tool("push, not compressed", f"{PUSH} --compression none"),
    Tool("push, not compressed, encrypted", f"{PUSH} --compression none {SEAL}"),
)


def pull(name: str, tag: str, words: str = "", *, strict: bool = False) -> Tool:
    """A contender that pulls `tag` to a directory; under a strict policy if asked for."""
    before = f"{STRICT}\n" if strict else ""
    # the policy is written within the measured time: a heredoc costs nothing beside a pull
    script = f"{before}cryoci pull -q {words} {REGISTRY}/bench/{tag}:1 {WORK}/out"
    return Tool(name, script, after=f"rm -rf {WORK}/out {POLICY}")


PULLERS = (
    pull("pull", "plain"),
    pull("pull, signature verified", "signed", strict=True),
    pull("pull, decrypted", "sealed", f"--decrypt-key {WORK}/id"),
    pull("pull, signature verified, decrypted", "both", f"--decrypt-key {WORK}/id", strict=True),
)


def table(title: str, results: dict[str, list[dict[str, float]]], raw: int) -> str:
    """Markdown; every row is compared with the first of its kind."""
    lines = [
        f"| {title} | s (median, min-max) | MB/s of checkpoint | CPU s | peak RSS MB | throughput |",
        "|---|---|---|---|---|---|",
    ]
    base = 0.0
    for name, runs in results.items():
        times = [r["s"] for r in runs]
        s, cpu = statistics.median(times), statistics.median(r["cpu"] for r in runs)
        if "crypted" not in name and "sign" not in name:
            base = s
        share = f"{100 * (base / s - 1):+.0f} %" if s != base else ""
        span = f"{s:.2f} ({min(times):.2f}-{max(times):.2f})"
        rss = max(r["rss"] for r in runs)
        lines.append(f"| {name} | {span} | {raw / s / 1e6:.0f} | {cpu:.1f} | {rss:.0f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a checkpoint directory to push; default: dump one")
    parser.add_argument("--size", type=int, default=2000, help="megabytes of memory of the dumped process")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with Cluster(tag="bench") as cluster:
        node = cluster.start("bench", scratch_mib=14336)
        raw = prepare(node, args.dir, args.size)
        node.sh(
            f"cryoci keygen --seal {WORK}/id >{WORK}/recipient && cd {WORK} && "
            "CRYOCI_KEY_PASSWORD=pw cryoci keygen k"
        )
        pushed = measure(node, PUSHERS, args.rounds, f"{WORK}/registry", empty=True)
        for name, seal in (("plain", ""), ("signed", ""), ("sealed", SEAL), ("both", SEAL)):
            node.sh(f"cryoci push -q {CK} {seal} {REGISTRY}/bench/{name}:1", timeout=300)
            if name in ("signed", "both"):
                node.sh(f"{SIGN}/bench/{name}:1")
        pulled = measure(node, PULLERS, args.rounds, f"{WORK}/out", empty=False)
        version = node.sh(
            "/opt/cryoci/bin/python -c 'import cryptography; print(cryptography.__version__)'"
        ).strip()
    print(f"{raw / 1e9:.2f} GB of CRIU image and descriptions; {args.rounds} rounds.")
    print(f"Load when it began: {load:.1f}.")
    print(f"{os.cpu_count()} cores, Linux {platform.release()}, tmpfs; cryptography {version}.\n")
    print(table("Package and push", pushed, raw), "\n")
    print(table("Pull to a directory", pulled, raw))


if __name__ == "__main__":
    main()
