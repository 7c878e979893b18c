#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checkpoint and restore of a container with much memory: CRIU alone, and with the memory out of band.

    python -m bench.memory --node --gib 1 4         in a fresh test node (root)

One process holds GIB of memory: half of it random, a quarter text, a quarter zeros. Each engine checkpoints it
by `cryoci-runtime checkpoint` and restores it by `cryoci-runtime restore`, in turns, to tmpfs and to a disk; there
the time until the images are durable counts (sync). The process compares its sha256 before and after. Memory is
the largest resident set of any program of the operation. How fast this machine's memory is stands beside it.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.passthrough import make_bundle

ENGINES = {
    "CRIU": 'engine = "criu"',
    "parallel": 'engine = "parallel"',
    "parallel, xxh3": 'engine = "parallel"\ndigest = "xxh3"',
    "parallel, no digests": 'engine = "parallel"\ndigest = "none"',
}
RUNTIME = "cryoci-runtime"
HOLDER = """
import hashlib, mmap, os, time
size = int({gib} * (1 << 30))
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
tile = os.urandom(1 << 20)
for at in range(0, size // 2, 1 << 20):
    memory[at : at + (1 << 20)] = tile
    memory[at : at + 8] = at.to_bytes(8, "little")
text = (b"All happy families are alike; each unhappy family is unhappy in its own way. " * 14000)[: 1 << 20]
for at in range(size // 2, size * 3 // 4, 1 << 20):
    memory[at : at + (1 << 20)] = text
for at in range(size * 3 // 4, size, 1 << 20):
    memory[at : at + (1 << 20)] = bytes(1 << 20)
asked = 0
while True:
    if os.path.exists("/data/ask"):
        total = hashlib.sha256()
        for at in range(0, size, 1 << 20):
            total.update(memory[at : at + (1 << 20)])
        os.unlink("/data/ask")
        with open("/data/new", "w") as f:
            f.write(total.hexdigest())
        os.rename("/data/new", "/data/told")
    time.sleep(0.01)
"""


class Subject:
    """The container, and how to ask it for its sha256."""

    def __init__(self, base: Path, gib: float, runtime: str) -> None:
        self.base, self.runtime, self.name = base, runtime, "bench-memory"
        base.mkdir()
        spec = json.loads(make_bundle(base))
        (base / "rootfs/data").mkdir()
        (base / "rootfs/data/holder.py").write_text(HOLDER.format(gib=gib))
        spec["process"]["args"] = ["/usr/bin/python3", "/data/holder.py"]
        (base / "config.json").write_text(json.dumps(spec))
        self.read, self.write = os.pipe()

    def call(self, *words: str) -> tuple[float, int]:
        """Run the runtime; returns seconds, and the largest resident set in MiB. Exits when it fails."""
        with open(self.base / "log", "wb") as log:
            start = time.perf_counter()
            pid = os.posix_spawnp(
                RUNTIME,
                [RUNTIME, *words],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, self.read, 0),
                    (os.POSIX_SPAWN_DUP2, self.write, 1),
                    (os.POSIX_SPAWN_DUP2, self.write if "-d" in words else log.fileno(), 2),
                ],
            )
            _, status, usage = os.wait4(pid, 0)
            elapsed = time.perf_counter() - start
        if status != 0:
            sys.exit(f"{words}: status {status}: {(self.base / 'log').read_text()}")
        return elapsed, usage.ru_maxrss >> 10

    def digest(self) -> str:
        (self.base / "rootfs/data/ask").touch()
        told = self.base / "rootfs/data/told"
        while not told.exists():
            time.sleep(0.02)
        found = told.read_text()
        told.unlink()
        return found


def configure(runtime: str, engine: str) -> None:
    path = Path("/etc/cryoci/config.toml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'[runtime]\npath = "{runtime}"\n[memory]\n{ENGINES[engine]}\n')


def once(subject: Subject, engine: str, images: Path, *, durable: bool) -> tuple[float, float, int, int]:
    """One checkpoint and restore: seconds of both, MiB resident in both."""
    configure(subject.runtime, engine)
    start = time.perf_counter()
    _, dump_memory = subject.call("checkpoint", "--image-path", str(images), subject.name)
    if durable:
        subprocess.run(["sync", "-f", str(images)], check=True)
    dump = time.perf_counter() - start
    subprocess.run([RUNTIME, "delete", "-f", subject.name], capture_output=True)
    restore, restore_memory = subject.call(
        "restore", "-d", "-b", str(subject.base), "--image-path", str(images), subject.name
    )
    shutil.rmtree(images)
    return dump, restore, dump_memory, restore_memory


def copies(threads: int) -> float:
    """GB/s of memcpy by so many threads, each over 256 MiB again and again."""
    size = 256 << 20
    pairs = [(ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)) for _ in range(threads)]

    def work(pair: tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]) -> None:
        for _ in range(4):
            ctypes.memmove(pair[0], pair[1], size)

    for pair in pairs:
        work(pair)
    all_ = [threading.Thread(target=work, args=(pair,)) for pair in pairs]
    start = time.perf_counter()
    for one in all_:
        one.start()
    for one in all_:
        one.join()
    return threads * 4 * size / (time.perf_counter() - start) / 1e9


def hashes() -> float:
    data = bytes(1 << 20)
    start = time.perf_counter()
    for _ in range(500):
        hashlib.sha256(data)
    return 500 * len(data) / (time.perf_counter() - start) / 1e9


def measure(base: Path, disk: Path, sizes: list[float], runs: int, runtime: str) -> None:
    """Print the tables."""
    print("| memory | to | engine | checkpoint, s | GB/s | restore, s | GB/s | MiB resident |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    for gib in sizes:
        subject = Subject(base / f"subject-{gib:g}", gib, runtime)
        configure(runtime, "CRIU")
        subject.call("run", "-d", "-b", str(subject.base), subject.name)
        before = subject.digest()
        for place, images in (("tmpfs", base / "images"), ("disk", disk / "images")):
            found: dict[str, list[tuple[float, float, int, int]]] = {engine: [] for engine in ENGINES}
            for _ in range(runs):
                for engine in ENGINES:
                    found[engine].append(once(subject, engine, images, durable=place == "disk"))
                    assert subject.digest() == before, "memory differs"
            plain = [statistics.median(column) for column in zip(*found["CRIU"], strict=True)]
            for engine, rows in found.items():
                dump, restore, *resident = (statistics.median(column) for column in zip(*rows, strict=True))
                factors = "" if engine == "CRIU" else " (**{:.1f}x**)"
                print(
                    f"| {gib:g} GiB | {place} | {engine} "
                    f"| {dump:.2f}{factors.format(plain[0] / dump)} | {gib * 1.0737 / dump:.1f} "
                    f"| {restore:.2f}{factors.format(plain[1] / restore)} | {gib * 1.0737 / restore:.1f} "
                    f"| {max(resident):.0f} |",
                    flush=True,
                )
        subprocess.run([RUNTIME, "delete", "-f", subject.name], capture_output=True)
    print(
        f"\nmemcpy: {copies(1):.1f} GB/s on one thread, {copies(2):.1f} on two; sha256: {hashes():.1f} GB/s on one"
    )


def in_node(args: argparse.Namespace) -> int:
    """Run this inside a fresh test node with the installed cryoci."""
    from tests.nodes.cluster import Cluster

    with Cluster(tag="bench") as cluster:
        node = cluster.start("a", disk=True)
        node.sh("mkdir /srv/memory /srv/disk; mount -t tmpfs -o size=16g tmpfs /srv/memory")
        for name in ("memory", "passthrough"):
            node.write(f"/srv/bench/{name}.py", (Path(__file__).with_name(f"{name}.py")).read_bytes())
        words = ["--runs", str(args.runs), "--runtime", args.runtime, "--gib", *map(str, args.gib)]
        script = 'cd /srv && exec python3 -m bench.memory "$@"'
        print(node.run(["sh", "-c", script, "sh", *words], timeout=3000).stdout.decode(), end="")
    return 0


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--runtime", default="runc")
    parser.add_argument("--tmpfs", default="/srv/memory", help="an empty directory on a tmpfs")
    parser.add_argument("--disk", default="/srv/disk", help="an empty directory on a disk")
    parser.add_argument("--node", action="store_true", help="run in a fresh test node")
    args = parser.parse_args()
    if args.node:
        return in_node(args)
    print(
        f"{args.runs} runs each, in turns; {args.runtime}, Linux {platform.release()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    measure(Path(args.tmpfs), Path(args.disk), args.gib, args.runs, args.runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
