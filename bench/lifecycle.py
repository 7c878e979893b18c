#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Whole lives of containers, many at once: what cryoci-runtime adds to them, and what it leaves behind.

    python -m bench.lifecycle --node                in a fresh test node (root)
    python -m bench.lifecycle --launcher PATH       on this machine, with the runtimes that it has (root)

A life is create, start, state, exec, kill, delete of a container of its own; with `--checkpoint-every N` each Nth life
has a checkpoint and a restore in its middle. The bare runtime and cryoci-runtime
take turns, in rounds of a fifth of the lives each. Prints a markdown table: lives per second, and what one life
takes; then what is there after all lives that was not there before, but for the logs of CRIU that cryoci-runtime keeps
of the last 32 containers. The exit status is 1 when that is anything.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.passthrough import make_bundle, spawn

ROUNDS = 5
# what cryoci-runtime keeps on purpose (shim/remains.py): CRIU's logs of this many containers that are gone
LOGS, KEPT = frozenset({"dump.log", "restore.log"}), 32


class Runtime:
    """One way to call one runtime; `lives` are seconds of each life, `walls` of each round.

    `moves` are the seconds of those lives that had a checkpoint and a restore, which every `every`th has.
    """

    def __init__(self, name: str, argv: list[str], env: dict[str, str], home: Path, every: int) -> None:
        self.name = name
        self.argv = argv
        self.env = env
        self.home = home
        self.every = every
        self.lives: list[float] = []
        self.moves: list[float] = []
        self.walls: list[float] = []

    def life(self, number: int) -> float:
        """One container from its bundle to nothing; returns seconds, the bundle's making not counted."""
        bundle, name = self.home / f"bundle{number}", f"life-{self.name}-{number}"
        spec = json.loads(make_bundle(bundle))
        spec["linux"]["cgroupsPath"] = f"/{name}"
        spec["linux"]["namespaces"].append({"type": "cgroup"})
        (bundle / "config.json").write_text(json.dumps(spec))
        images = ["--image-path", str(bundle / "images"), "--work-path", str(bundle / "images")]
        moves = self.every > 0 and number % self.every == 0
        (bundle / "images").mkdir()
        began = time.perf_counter()
        for words in (
            ["create", "--bundle", str(bundle), "--pid-file", str(bundle / "pid"), name],
            ["start", name],
            ["state", name],
            ["exec", name, "/bin/true"],
            *(
                [
                    ["checkpoint", *images, name],
                    ["delete", "--force", name],
                    ["restore", "--detach", "--bundle", str(bundle), *images, name],
                    ["state", name],
                ]
                if moves
                else []
            ),
            ["kill", name, "KILL"],
            ["delete", "--force", name],
        ):
            spawn([*self.argv, *words], self.env)
        took = time.perf_counter() - began
        shutil.rmtree(bundle)
        if moves:
            self.moves.append(took)
        return took

    def round(self, first: int, count: int, at_once: int) -> None:
        """`count` lives, `at_once` in parallel."""
        began = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            self.lives += pool.map(self.life, range(first, first + count))
        self.walls.append(time.perf_counter() - began)


def census(*directories: Path) -> dict[str, set[str]]:
    """Everything on this machine that a container could leave behind."""
    processes, descriptors = set(), set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words and int(pid) != os.getpid():
                processes.add(f"{pid} {words}")
                descriptors |= {f"{pid}:{fd}" for fd in os.listdir(f"/proc/{pid}/fd")}
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    groups = {path for path, _, _ in os.walk("/sys/fs/cgroup")}
    found, kept = set(), set()
    for place in (path for directory in directories for path in directory.rglob("*")):
        logs = place.name in LOGS and "containers" in place.parts
        if logs or (place.is_dir() and {p.name for p in place.iterdir()} & LOGS):
            kept.add(str(place.parent if logs else place))
        else:
            found.add(str(place))
    if len(kept) > KEPT:
        found |= kept
    return {
        "processes": processes,
        "descriptors": descriptors,
        "mounts": mounts,
        "cgroups": groups,
        "files": found,
    }


def measure(
    kind: str, launcher: Path, lives: int, at_once: int, every: int, scratch: Path
) -> dict[str, list[str]]:
    """Run both ways of one runtime and print its rows; returns what was left behind, by kind."""
    path = shutil.which(kind, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or sys.exit(f"no {kind}")
    home = scratch / kind
    for name in ("bare", "ours", "run"):
        (home / name).mkdir(parents=True)
    (home / "config.toml").write_text(f'[runtime]\npath = "{path}"\n')
    plain = {"PATH": os.environ["PATH"]}
    state = {**plain, "CRYOCI_RUN": str(home / "run"), "CRYOCI_CONFIG": str(home / "config.toml")}
    bare = Runtime("bare", [path, "--root", str(home / "bare" / "root")], plain, home / "bare", every)
    ours = Runtime(
        "cryoci", [str(launcher), "--root", str(home / "ours" / "root")], state, home / "ours", every
    )
    for one in (bare, ours):
        one.round(0, 2, 1)  # caches are warm now, directories made
        one.lives.clear()
        one.walls.clear()
        one.moves.clear()
    before = census(home)
    share = lives // ROUNDS
    for number in range(ROUNDS):
        for one in (bare, ours):
            one.round(2 + number * share, share, at_once)
    after = census(home)
    for one in (bare, ours):
        rate = len(one.lives) / sum(one.walls)
        p95 = statistics.quantiles(one.lives, n=20)[18]
        print(
            f"| {kind} | {'alone' if one is bare else 'cryoci-runtime'} | {len(one.lives)} | {rate:.1f} "
            f"| {1000 / rate:.1f} | {statistics.median(one.lives) * 1000:.0f} | {p95 * 1000:.0f} |"
        )
        if one.moves:
            print(f"| | of these checkpointed and restored | {len(one.moves)} | | "
                  f"| {statistics.median(one.moves) * 1000:.0f} | |")  # fmt: skip
    return {name: sorted(after[name] - before[name]) for name in after if after[name] - before[name]}


def in_node(words: list[str]) -> int:
    """Run this program inside a fresh test node with the installed cryoci."""
    from tests.nodes.cluster import Cluster

    with Cluster(tag="bench") as cluster:
        node = cluster.start("a")
        for path in (Path(__file__), Path(__file__).with_name("passthrough.py")):
            node.write(f"/srv/bench/{path.name}", path.read_bytes())
        argv = ["/bin/sh", "-c", 'cd /srv && exec python3 -m bench.lifecycle "$@"', "sh", *words]
        result = node.run(argv, check=False, timeout=1800)
        print(result.stdout.decode() + result.stderr.decode(), end="")
    return result.returncode


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtimes", nargs="*", default=["runc", "crun"])
    parser.add_argument("--lives", type=int, default=200, help="of each runtime, each way")
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument(
        "--checkpoint-every", type=int, default=0, metavar="N", help="0: none is checkpointed"
    )
    parser.add_argument("--launcher", type=Path, default=Path("/usr/local/bin/cryoci-runtime"))
    parser.add_argument("--node", action="store_true", help="run in a fresh test node")
    args = parser.parse_args()
    if args.node:
        counts = (
            ("--lives", args.lives),
            ("--at-once", args.at_once),
            ("--checkpoint-every", args.checkpoint_every),
        )
        return in_node([*(str(word) for pair in counts for word in pair), *args.runtimes])
    print(
        f"{args.lives} lives each, {args.at_once} at once, Linux {platform.release()}, {os.cpu_count()} cores\n"
    )
    print("| runtime | called | lives | lives/s | ms of machine time a life | life, ms | life p95, ms |")
    print("|---|---|---:|---:|---:|---:|---:|")
    left: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(
        prefix="cryoci-bench.", dir="/srv" if os.path.isdir("/srv") else None
    ) as scratch:
        for kind in args.runtimes:
            every, place = args.checkpoint_every, Path(scratch)
            for what, names in measure(kind, args.launcher, args.lives, args.at_once, every, place).items():
                left.setdefault(what, []).extend(names)
    print(f"\nleft behind: {json.dumps(left, indent=1) if left else 'nothing'}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
