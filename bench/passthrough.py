#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What cryoci-runtime costs at each call, against bare runc and crun.

    python -m bench.passthrough --node            in a fresh test node (root)
    bench/passthrough.py --launcher PATH          on this machine, with the runtimes that it has (root)

All programs are run in turn, call by call, so that the machine's mood is shared. Questions are asked of
one created container; a life is create, start, state, kill, delete of a fresh one. Prints a markdown table of
milliseconds from spawn to exit: median of the bare runtime, median through cryoci-runtime, the median of
what that adds, and the 95th percentiles.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

QUESTIONS = (["--version"], ["features"], ["list"], ["state", "bench-q"], ["checkpoint", "--help"])
LIFE = ("create", "start", "state", "kill", "delete")
GOAL = 5.0  # ms


def spawn(argv: list[str], env: dict[str, str]) -> float:
    """Run a program to its end; returns milliseconds. Exits when the program fails."""
    null = [(os.POSIX_SPAWN_OPEN, n, "/dev/null", os.O_RDWR, 0) for n in (0, 1, 2)]
    start = time.perf_counter_ns()
    pid = os.posix_spawn(argv[0], argv, env, file_actions=null)
    _, status = os.waitpid(pid, 0)
    elapsed = (time.perf_counter_ns() - start) / 1e6
    if status != 0:
        sys.exit(f"status {os.waitstatus_to_exitcode(status)}: {subprocess.run(argv, env=env, check=False)}")
    return elapsed


def make_bundle(path: Path) -> bytes:
    """A bundle that sleeps, on this machine's own /usr; returns its config.json."""
    for name in ("proc", "sys", "dev", "usr", "etc"):
        (path / "rootfs" / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / "rootfs" / name).symlink_to(f"usr/{name}")
    kinds = ("pid", "ipc", "uts", "mount")
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "cwd": "/",
            "args": ["sleep", "1000"],
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"],
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }
    return json.dumps(spec, indent=1).encode()


class Program:
    """One way to call one runtime: bare, or through cryoci-runtime with a configuration that names it."""

    def __init__(self, kind: str, argv: list[str], env: dict[str, str]) -> None:
        self.kind = kind
        self.argv = argv
        self.env = env
        self.times: dict[str, list[float]] = {}

    def call(self, label: str, words: list[str]) -> None:
        """Run once and note the time under `label`."""
        self.times.setdefault(label, []).append(spawn([*self.argv, *words], self.env))

    def life(self, bundle: Path, spec: bytes, name: str) -> None:
        """One container's life; the bundle is the engine's, new each time."""
        (bundle / "config.json").write_bytes(spec)
        words = {"create": ["--bundle", str(bundle), name], "kill": [name, "KILL"]}
        for verb in LIFE:
            if verb == "delete":
                self.wait_stopped(name)
            self.call(f"{verb} (life)" if verb == "state" else verb, [verb, *words.get(verb, [name])])

    def wait_stopped(self, name: str) -> None:
        """Wait until the container's process is gone, not timed."""
        while True:
            state = subprocess.run(
                [*self.argv, "state", name], env=self.env, capture_output=True, check=True
            ).stdout
            if json.loads(state)["status"] == "stopped":
                return
            time.sleep(0.002)


def measure(kind: str, launcher: Path, runs: int, scratch: Path) -> tuple[Program, Program]:
    """Time one runtime bare and through the launcher. The programs take turns."""
    path = shutil.which(kind, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or sys.exit(f"no {kind}")
    home = scratch / kind
    home.mkdir()
    (home / "config.toml").write_text(f'[runtime]\npath = "{path}"\n')
    bare = Program(kind, [path, "--root", str(home / "bare")], {"PATH": os.environ["PATH"]})
    state = {"CRYOCI_RUN": str(home / "run"), "CRYOCI_CONFIG": str(home / "config.toml")}
    ours = Program(kind, [str(launcher), "--root", str(home / "ours")], {**bare.env, **state})
    bundles = {program: home / str(n) for n, program in enumerate((bare, ours))}
    specs = {program: make_bundle(bundle) for program, bundle in bundles.items()}
    for program, bundle in bundles.items():
        (bundle / "config.json").write_bytes(specs[program])
        spawn([*program.argv, "create", "--bundle", str(bundle), "bench-q"], program.env)
    try:
        for words in QUESTIONS:
            for n in range(runs + 3):
                for program in (bare, ours):
                    program.call(" ".join(words).replace(" bench-q", ""), words)
                    if n == 2:
                        program.times[" ".join(words).replace(" bench-q", "")].clear()  # warm now
        for n in range(runs):
            for program, bundle in bundles.items():
                program.life(bundle, specs[program], f"life{n}")
    finally:
        for program in (bare, ours):
            spawn([*program.argv, "delete", "--force", "bench-q"], program.env)
    return bare, ours


def rows(bare: Program, ours: Program) -> Iterator[str]:
    """Lines of the markdown table."""
    for label, mine in bare.times.items():
        theirs = ours.times[label]
        added = statistics.median(b - a for a, b in zip(mine, theirs, strict=True))
        p95 = [statistics.quantiles(t, n=20)[18] for t in (mine, theirs)]
        yield (
            f"| {bare.kind} | `{label}` | {statistics.median(mine):.2f} | {statistics.median(theirs):.2f} "
            f"| **{added:+.2f}** | {p95[0]:.2f} | {p95[1]:.2f} |"
        )


def in_node(runs: int, runtimes: list[str]) -> int:
    """Run this file inside a fresh test node with the installed cryoci."""
    from tests.nodes.cluster import Cluster

    with Cluster(tag="bench") as cluster:
        node = cluster.start("a")
        node.write("/srv/passthrough.py", Path(__file__).read_bytes())
        words = ["python3", "/srv/passthrough.py", "--runs", str(runs), *runtimes]
        print(node.run(words, timeout=1800).stdout.decode(), end="")
    return 0


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtimes", nargs="*", default=["runc", "crun"])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--launcher", type=Path, default=Path("/usr/local/bin/cryoci-runtime"))
    parser.add_argument("--node", action="store_true", help="run in a fresh test node")
    args = parser.parse_args()
    if args.node:
        return in_node(args.runs, args.runtimes)
    python = subprocess.run(
        ["/usr/bin/python3", "--version"], capture_output=True, text=True, check=True
    ).stdout
    print(
        f"{args.runs} runs each, interleaved; {python.strip()}, Linux {platform.release()}, {os.cpu_count()} cores\n"
    )
    print("| runtime | call | bare, ms | cryoci-runtime, ms | added, ms | bare p95 | cryoci p95 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(
        prefix="cryoci-bench.", dir="/srv" if os.path.isdir("/srv") else None
    ) as scratch:
        for kind in args.runtimes:
            for line in rows(*measure(kind, args.launcher, args.runs, Path(scratch))):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
