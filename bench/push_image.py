#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Package and push a real CRIU image: cryoci against the oras CLI, buildah and skopeo.

    python -m bench.push_image                  in a fresh test node (root), on a dump made there
    python -m bench.push_image --gb 2 6 --disk  one after the other on these sizes; 6 GB fit on no tmpfs of ours
    python -m bench.push_image --push --only cryoci 'oras push'   some of the tools, and no pulls
    python -m bench.push_image --dir DIR        in a fresh test node, on a checkpoint directory of yours
    python -m bench.push_image --here           on this machine (/var/tmp/bench), with those of the tools that it has

Everything happens in one node: a process with 2 GB of varied memory is dumped by criu, and each tool brings
the result to a docker-registry on loopback. The tools take turns, round by round, so that the machine's mood is
shared; the registry starts empty each time, and the checkpoint
lies in the page cache, as one just made does. Prints a markdown table: medians of seconds, the peak resident
memory of the largest process of each tool, and its scratch: the most that the disk held during the run, less what
it held before and what the target holds in the end (sampled every 20 ms).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bench.here import Here
from tests.nodes.cluster import Cluster
from tests.nodes.node import Node

REGISTRY = "127.0.0.1:5000"
WORK = "/var/tmp/bench"
CK = f"{WORK}/ck"

# Memory as a process has it: noise (ciphertext, media), floats, half-zero floats, text, zeros, small objects.
WORKLOAD = """
import os, sys, time
M = 1 << 20
scale = int(sys.argv[1]) / 2000
def noise(n): return bytearray().join(os.urandom(M) for _ in range(int(n * scale)))
def floats(n):
    block = bytearray()
    for _ in range(int(n * scale)):
        raw = bytearray(os.urandom(M))
        raw[3::4] = bytes(60 + b % 4 for b in raw[3::4])
        block += raw
    return block
def halves(n):
    block = floats(n)
    for i in range(0, len(block), 128): block[i:i + 64] = bytes(64)
    return block
def text(n):
    words = [os.urandom(3).hex() for _ in range(5000)]
    pick = os.urandom(400000)
    line = " ".join(words[(a << 8 | b) % 5000] for a, b in zip(pick[::2], pick[1::2])).encode()
    return bytearray().join(line[i % 1000:] for i in range(int(n * scale * M / len(line))))
def zeros(n):
    block = bytearray(int(n * scale) * M)
    for i in range(0, len(block), 4096): block[i] = 0
    return block
held = [noise(300), floats(500), halves(300), text(250), zeros(350)]
held.append([{"id": i, "name": f"object {i}", "weight": i / 7} for i in range(int(600000 * scale))])
open(sys.argv[2], "w").write("ready")
time.sleep(100000)
"""

DUMP = f"""
mkdir -p {CK}/checkpoint
setsid python3 {WORK}/workload.py "$1" {WORK}/ready </dev/null >/dev/null 2>&1 &
pid=$!
until [ -e {WORK}/ready ]; do kill -0 $pid; sleep 0.1; done
criu dump -t $pid -D {CK}/checkpoint -o {CK}/dump.log
rm -f {CK}/checkpoint/*.log
"""

# Runs inside the node: one tool, timed; a fork of a small process, so that its own memory does not count.
TIMER = """
import json, os, resource, subprocess, sys, threading, time
target = sys.argv[2]
def used():
    space = os.statvfs(os.path.dirname(target))
    return (space.f_blocks - space.f_bfree) * space.f_frsize
def size():
    return sum(os.stat(os.path.join(top, n), follow_symlinks=False).st_blocks * 512
               for top, _, names in os.walk(target) for n in names)
before, held, peak, done = used(), size(), used(), threading.Event()
def watch():
    global peak
    while not done.wait(0.02):
        peak = max(peak, used())
watcher = threading.Thread(target=watch)
watcher.start()
began = time.monotonic()
status = subprocess.run(["/bin/sh", "-euc", sys.argv[1]], stdout=subprocess.DEVNULL).returncode
took = time.monotonic() - began
done.set()
watcher.join()
use = resource.getrusage(resource.RUSAGE_CHILDREN)
scratch = max(0, max(peak, used()) - before - (size() - held))
print(json.dumps({"status": status, "s": took, "cpu": use.ru_utime + use.ru_stime, "rss": use.ru_maxrss / 1024,
                  "scratch": scratch}))
"""

ORAS_PY = """
import os, sys
from oras.client import OrasClient
client = OrasClient(insecure=True)
if sys.argv[1] == "push":
    names = [os.path.relpath(os.path.join(top, n)) for top, _, found in os.walk(".") for n in found]
    client.push(target=sys.argv[2], files=names, disable_path_validation=True)
else:
    client.pull(target=sys.argv[2], outdir=sys.argv[3])
"""


@dataclass(frozen=True)
class Tool:
    """One contender: `script` is timed; `before` and `after` are not."""

    name: str
    script: str
    before: str = ""
    after: str = ""


NAME = "-a org.criu.checkpoint.container.name=bench"
ORAS = f"cd {CK} && oras push --plain-http --disable-path-validation"
TOOLS = (
    Tool("cryoci push", f"cryoci push -q {CK} {REGISTRY}/bench/image:1"),
    Tool(
        "cryoci push --compression zstd:-3",
        f"cryoci push -q --compression zstd:-3 {CK} {REGISTRY}/bench/image:1",
    ),
    Tool(
        "cryoci push --compression none", f"cryoci push -q --compression none {CK} {REGISTRY}/bench/image:1"
    ),
    Tool(
        "oras-py push, files as they are",
        f"cd {CK} && $PYTHON {WORK}/oras_py.py push {REGISTRY}/bench/image:1",
    ),
    Tool("oras push, files as they are", f"{ORAS} {REGISTRY}/bench/image:1 $(find . -type f -printf '%P ')"),
    Tool(
        "tar, zstd -1 -T2, oras push",
        f"tar -C {CK} -c . | zstd -q -1 -T2 -f -o {WORK}/ck.tar.zst && cd {WORK} && "
        f"oras push --plain-http {REGISTRY}/bench/image:1 ck.tar.zst:application/vnd.oci.image.layer.v1.tar+zstd",
        after=f"rm -f {WORK}/ck.tar.zst",
    ),
    Tool(
        "cryoci push to a layout, skopeo copy",
        # skopeo needs a layout: the one that cryoci makes stands in for a tool that would make it
        f"cryoci push -q {CK} oci:{WORK}/layout:1 && skopeo copy -q --preserve-digests --dest-tls-verify=false "
        f"oci:{WORK}/layout:1 docker://{REGISTRY}/bench/image:1",
        after=f"rm -rf {WORK}/layout",
    ),
    Tool(
        "buildah add, commit, push (zstd 1)",
        f"tar -C {CK} -cf {WORK}/ck.tar . && c=$(buildah from scratch) && buildah add -q $c {WORK}/ck.tar / && "
        "buildah config --annotation=org.criu.checkpoint.container.name=bench $c && "
        f"buildah commit -q $c bench && buildah push -q --tls-verify=false --compression-format zstd "
        f"--compression-level 1 bench docker://{REGISTRY}/bench/image:1",
        after=f"buildah rm -a; buildah rmi -f bench; buildah prune -f; rm -f {WORK}/ck.tar",
    ),
)
# The same finished image from a layout to the registry: transport alone.
MOVERS = (
    Tool("cryoci push LAYOUT", f"cryoci push -q oci:{WORK}/made:1 {REGISTRY}/bench/image:1"),
    Tool(
        "oras cp --from-oci-layout",
        f"oras cp --from-oci-layout --to-plain-http {WORK}/made:1 {REGISTRY}/bench/image:1",
    ),
    Tool(
        "skopeo copy --preserve-digests",
        f"skopeo copy -q --preserve-digests --dest-tls-verify=false oci:{WORK}/made:1 docker://{REGISTRY}/bench/image:1",
    ),
)
# And back: from the registry to a directory of files.
UNPACK = (
    f"mkdir {WORK}/files && for b in {WORK}/out/blobs/sha256/*; do "
    f"zstd -dqc $b 2>/dev/null | tar -xC {WORK}/files 2>/dev/null || true; done"
)
PULLERS = (
    Tool(
        "cryoci pull to a directory",
        f"cryoci pull -q {REGISTRY}/bench/image:1 {WORK}/out",
        after=f"rm -rf {WORK}/out",
    ),
    Tool(
        "oras pull, zstd -d, tar -x",
        f"oras copy --from-plain-http --to-oci-layout {REGISTRY}/bench/image:1 {WORK}/out:1 && {UNPACK}",
        after=f"rm -rf {WORK}/out {WORK}/files",
    ),
    Tool(
        "skopeo copy to a layout, zstd -d, tar -x",
        f"skopeo copy -q --src-tls-verify=false docker://{REGISTRY}/bench/image:1 oci:{WORK}/out:1 && {UNPACK}",
        after=f"rm -rf {WORK}/out {WORK}/files",
    ),
    # an image index is nothing to oras-py, and files are what both oras pull best: those that oras pushed
    Tool(
        "oras pull, files as they are",
        f"oras pull --plain-http -o {WORK}/out {REGISTRY}/bench/raw:1",
        after=f"rm -rf {WORK}/out",
    ),
    Tool(
        "oras-py pull, files as they are",
        f"$PYTHON {WORK}/oras_py.py pull {REGISTRY}/bench/raw:1 {WORK}/out",
        after=f"rm -rf {WORK}/out",
    ),
    Tool(
        "podman pull", f"podman pull -q --tls-verify=false {REGISTRY}/bench/image:1", after="podman rmi -fa"
    ),
)


def measure(
    node: Node, tools: tuple[Tool, ...], rounds: int, target: str, *, empty: bool
) -> dict[str, list[dict[str, float]]]:
    """All tools, `rounds` times in turn, to the directory `target`; with `empty`, each starts at an empty registry."""
    results: dict[str, list[dict[str, float]]] = {tool.name: [] for tool in tools}
    for number in range(rounds):
        for tool in tools:
            if empty:
                fresh_registry(node)
            node.sh(f"sync; cat {CK}/checkpoint/* >/dev/null", timeout=600)
            said = node.run(
                ["python3", "-IS", f"{WORK}/timer.py", tool.script, target],
                timeout=1800,
                env={"PYTHON": sys.executable if isinstance(node, Here) else "/opt/cryoci/bin/python3"},
            )
            result = json.loads(said.stdout)
            if result["status"] != 0:
                sys.exit(f"{tool.name} failed: {said.stderr.decode(errors='replace')[-3000:]}")
            results[tool.name].append(result)
            print(
                f"  round {number + 1}: {tool.name}: {result['s']:.2f} s, {result['rss']:.0f} MB",
                file=sys.stderr,
            )
            if tool.after:
                node.sh(tool.after + " >/dev/null 2>&1 || true", check=False, timeout=120)
    return results


def fresh_registry(node: Node) -> None:
    """A registry on loopback with nothing in it."""
    node.sh(
        f"if [ -e {WORK}/registry.pid ]; then kill $(cat {WORK}/registry.pid) || true; sleep 0.2; fi\n"
        f"rm -rf {WORK}/registry; mkdir -p {WORK}/registry\n"
        f"setsid docker-registry serve {WORK}/registry.yml >{WORK}/registry.log 2>&1 </dev/null & "
        f"echo $! >{WORK}/registry.pid\n"
        f"until oras repo ls --plain-http {REGISTRY} >/dev/null 2>&1; do sleep 0.05; done"
    )


def table(title: str, results: dict[str, list[dict[str, float]]], raw: int) -> str:
    """Markdown; the first row is cryoci, to which the others are compared."""
    base = statistics.median(r["s"] for r in next(iter(results.values())))
    lines = [
        f"| {title} | s (median, min-max) | MB/s of checkpoint | CPU s | peak RSS MB | scratch MB | cryoci is |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        times = [r["s"] for r in runs]
        s = statistics.median(times)
        cpu, rss = statistics.median(r["cpu"] for r in runs), max(r["rss"] for r in runs)
        scratch = max(r["scratch"] for r in runs) / 1e6
        factor = (
            ""
            if name.startswith("cryoci")
            else f"{s / base:.1f}x faster"
            if s > base
            else f"{base / s:.1f}x slower"
        )
        span = f"{s:.2f} ({min(times):.2f}-{max(times):.2f})"
        lines.append(
            f"| {name} | {span} | {raw / s / 1e6:.0f} | {cpu:.1f} | {rss:.0f} | {scratch:.0f} | {factor} |"
        )
    return "\n".join(lines)


def copy_in(node: Node, directory: Path) -> None:
    """A checkpoint directory of the host, into the node, as a tar through a pipe-sized file."""
    packed = Path(f"/tmp/cryoci-bench-{os.getpid()}.tar")
    try:
        with tarfile.open(packed, "w") as tar:
            tar.add(directory, "ck")
        node.write(f"{WORK}/in.tar", packed.read_bytes())
    finally:
        packed.unlink(missing_ok=True)
    node.sh(f"tar -xf {WORK}/in.tar -C {WORK} && rm {WORK}/in.tar", timeout=300)


def prepare(node: Node, directory: Path | None, megabytes: int) -> int:
    """The checkpoint, in the node; returns its bytes."""
    node.write(f"{WORK}/timer.py", TIMER)
    node.write(f"{WORK}/workload.py", WORKLOAD)
    node.write(f"{WORK}/oras_py.py", ORAS_PY)
    node.write(
        f"{WORK}/registry.yml",
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {WORK}/registry}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{REGISTRY}'}}\n",
    )
    if directory:
        copy_in(node, directory)
    else:
        node.sh(DUMP, str(megabytes), timeout=600)
        config = {"id": "be" * 32, "name": "bench", "rootfsImageName": "docker.io/library/debian:trixie"}
        node.write(f"{CK}/config.dump", json.dumps({**config, "runtime": "runc"}))
        node.write(f"{CK}/spec.dump", json.dumps({"annotations": {"io.container.manager": "libpod"}}))
    return int(node.sh(f"find {CK} -type f -printf '%s\\n' | awk '{{s+=$1}} END {{print s}}'"))


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="a checkpoint directory to push; default: dump one")
    parser.add_argument("--size", type=int, default=2000, help="megabytes of memory of the dumped process")
    parser.add_argument(
        "--gb", type=int, nargs="+", metavar="N", help="gigabytes, instead of --size; several in turn"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", action="store_true", help="node storage on disk; default: tmpfs")
    parser.add_argument("--here", action="store_true", help="on this machine, without a test node")
    parser.add_argument("--push", action="store_true", help="package and push alone")
    parser.add_argument(
        "--link", type=int, metavar="MBIT", help="hold the loopback to this; default: as it is"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORDS", help="tools whose names have any of these words"
    )
    args = parser.parse_args()
    for megabytes in [gb * 1000 for gb in args.gb] if args.gb else [args.size]:
        compare(args, megabytes)


def compare(args: argparse.Namespace, megabytes: int) -> None:
    """All tables for one checkpoint."""
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        node: Node = Here()
        if not args.here:
            cluster = stack.enter_context(Cluster(tag="bench"))
            node = cluster.start("bench", scratch_mib=max(14336, megabytes * 6), disk=args.disk)
        raw = prepare(node, args.dir, megabytes)
        if args.link:
            node.sh(f"tc qdisc add dev lo root tbf rate {args.link}mbit burst 2m latency 20ms")
        versions = node.sh(
            "for t in criu skopeo buildah podman; do command -v $t >&2 && printf '%s %s, ' $t \"$($t --version | "
            "grep -oE '[0-9]+\\.[0-9]+(\\.[0-9]+)?' | head -1)\"; done; oras version | head -1 | "
            "tr -s ' ' | sed s/Version:/oras/"
        )
        pushed = measure(node, chosen(TOOLS, args), args.rounds, f"{WORK}/registry", empty=True)
        node.sh(f"cryoci push -q {CK} oci:{WORK}/made:1", timeout=600)
        size = json.loads(node.sh(f"cryoci inspect --json oci:{WORK}/made:1"))["image"]["size"]
        moved, pulled = ({}, {}) if args.push else others(node, args)
        kind = node.sh(f"stat -f -c %T {WORK}").strip()
    print(f"{raw / 1e9:.2f} GB of CRIU image and descriptions, {size / 1e9:.2f} GB as an image (zstd 1).")
    print(f"Load when it began: {load:.1f}.")
    kind += f", a link of {args.link} Mbit/s" if args.link else ""
    print(f"{os.cpu_count()} cores, Linux {platform.release()}, {kind}; {versions.strip()}.\n")
    print(table("Package and push", pushed, raw), "\n")
    if moved:
        print(table("Push a finished image", moved, raw), "\n")
    if pulled:
        print(table("Pull", pulled, raw), "\n")


def chosen(tools: tuple[Tool, ...], args: argparse.Namespace) -> tuple[Tool, ...]:
    """Those of `tools` that were asked for and are there; always the first, to which others are compared."""
    wanted = [
        t for t in tools if not args.only or t is tools[0] or any(words in t.name for words in args.only)
    ]
    lacking = [
        p for p in ("oras", "skopeo", "buildah", "podman", "zstd") if args.here and not shutil.which(p)
    ]
    return tuple(t for t in wanted if not any(f"{p} " in t.script for p in lacking))


Results = dict[str, list[dict[str, float]]]


def others(node: Node, args: argparse.Namespace) -> tuple[Results, Results]:
    """Pushes of the finished image, and pulls."""
    moved = measure(node, chosen(MOVERS, args), args.rounds, f"{WORK}/registry", empty=True)
    node.sh(f"cryoci push -q {CK} {REGISTRY}/bench/image:1", timeout=600)
    node.sh(f"{ORAS} {REGISTRY}/bench/raw:1 $(find . -type f -printf '%P ')", timeout=600)
    return moved, measure(node, chosen(PULLERS, args), args.rounds, f"{WORK}/out", empty=False)


if __name__ == "__main__":
    main()
