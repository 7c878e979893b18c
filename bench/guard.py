#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a guard costs a job, and what it saves after a crash, against starting the job again.

    python -m bench.guard [--every 5] [--kills 5] [--seconds 40]          in a fresh test node (root)

The job is a container that builds its data set (real work), then trains step by step and writes each step and its loss
into a file. It is run alone, then guarded for as long: the pauses' share of the time. Then it is killed at random
moments, and each time it is measured how long it takes to be at the step that it had: by the guard, and by
starting the script from scratch. Every line of the file is checked: no step is missing, double or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

JOB = """
import hashlib, os
data = bytearray()
seed = b"cryoci"
while len(data) < 24 << 20:  # the data set: 24 MiB that must be computed
    seed = hashlib.sha256(seed).digest()
    data += seed * 2
loss, step = 0, 0
out = open("/data/steps", "w")
while True:
    step += 1
    at = step * 65536 % (len(data) - 65536)
    for _ in range(40):
        loss = int.from_bytes(hashlib.sha256(loss.to_bytes(8, "big") + data[at : at + 65536]).digest()[:8], "big")
    out.write(f"{step} {loss}\\n")
    out.flush()
"""


class Job:
    """The job in podman on `node`."""

    def __init__(self, node: NamespaceNode, name: str) -> None:
        self.node, self.name = node, name

    def start(self) -> None:
        """Start it from scratch."""
        self.node.run([
            "podman", "run", "--detach", "--quiet", "--network=none", f"--name={self.name}", workload.IMAGE,
            "python3", "-u", "-c", JOB,
        ])  # fmt: skip

    def pid(self) -> int:
        asked = self.node.run(
            ["podman", "container", "inspect", "--format={{.State.Pid}}", self.name], check=False
        )
        return int(asked.stdout) if asked.returncode == 0 else 0

    def lines(self, pid: int) -> list[str]:
        """What process `pid` has written; the last line may be half."""
        try:
            return self.node.path(f"/proc/{pid}/root/data/steps").read_text().splitlines()[:-1]
        except OSError:
            return []

    def reach(self, step: int, timeout: float = 300) -> float:
        """Wait until it has done `step`; returns when (monotonic)."""
        end, pid = time.monotonic() + timeout, 0
        while time.monotonic() < end:
            pid = pid or self.pid()
            if len(self.lines(pid)) >= step:
                return time.monotonic()
            if not os.path.exists(self.node.path(f"/proc/{pid}")):
                pid = 0
            time.sleep(0.02)
        raise SystemExit(f"{self.name} did not reach step {step} within {timeout:g} s")

    def rate(self, seconds: float) -> float:
        """Steps per second over `seconds`."""
        before, started = len(self.lines(self.pid())), time.monotonic()
        time.sleep(seconds)
        return (len(self.lines(self.pid())) - before) / (time.monotonic() - started)

    def remove(self) -> None:
        self.node.run(["podman", "rm", "--force", "--time=0", self.name])


def state(node: NamespaceNode, name: str) -> dict[str, list[dict[str, float]]]:
    """What the guard says."""
    found = json.loads(node.run(["cryoci", "guard", "status", name, "--json"]).stdout)[0]["state"]
    assert isinstance(found, dict)
    return found


def check(truth: dict[int, str], lines: list[str]) -> None:
    """No step may be missing, double or other than it was in an earlier life."""
    for number, line in enumerate(lines, 1):
        step, loss = line.split()
        if int(step) != number or truth.setdefault(number, loss) != loss:
            raise SystemExit(f"step {number} is wrong: {line}")


def guarded(node: NamespaceNode, every: float, to: str, kills: int, seconds: float) -> dict[str, float]:
    """Numbers of one guarded job."""
    job = Job(node, "guarded")
    job.start()
    job.reach(1)
    guard = node.popen(
        ["cryoci", "guard", job.name, "--every", f"{every}s", "--to", to, "--stable", "1s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    dice, truth = random.Random(7), dict[int, str]()
    time.sleep(every)
    rate = job.rate(seconds)
    pauses = [kept["pause"] for kept in state(node, job.name)["kept"]]
    back, lost, down = [], [], []
    for number in range(1, kills + 1):
        time.sleep(every + dice.uniform(0, every))
        pid = job.pid()
        node.run(["kill", "-STOP", str(pid)])  # so that its last words can be read
        had = job.lines(pid)
        check(truth, had)
        node.run(["kill", "-KILL", str(pid)])
        at = time.monotonic()
        while len(state(node, job.name)["recoveries"]) < number:
            time.sleep(0.1)
        back.append(job.reach(len(had)) - at)
        check(truth, job.lines(job.pid()))
        recovery = state(node, job.name)["recoveries"][-1]
        lost.append(recovery["lost"])
        down.append(recovery["down"])
        pauses += [kept["pause"] for kept in state(node, job.name)["kept"]]
        last = len(had)
    node.run(["cryoci", "guard", "stop", job.name, "--remove"])
    guard.wait()
    job.remove()
    return {
        "rate": rate, "pause": statistics.median(pauses), "share": statistics.median(pauses) / every,
        "back": statistics.median(back), "worst": max(back), "lost": statistics.median(lost),
        "down": statistics.median(down), "step": last,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=float, default=5)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with Cluster(tag="bench") as cluster:
        node = cluster.start("node")
        workload.load(node)
        job = Job(node, "alone")
        started = time.monotonic()
        job.start()
        cold = job.reach(1) - started
        alone = job.rate(options.seconds)
        job.remove()
        rows = {
            to: guarded(node, options.every, to, options.kills, options.seconds) for to in ("tmpfs", "disk")
        }
        print(
            f"{options.kills} kills each, a checkpoint every {options.every:g} s; Python {platform.python_version()}, "
            f"Linux {platform.release()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
        )
        print("| to | pause, s | of the time | steps/s alone | guarded | lost, s | down, s | back at its step, s |"
              " worst | from scratch, s |")  # fmt: skip
        print("|---|" + "---:|" * 9)
        for to, row in rows.items():
            scratch = Job(node, "scratch")
            started = time.monotonic()
            scratch.start()
            again = scratch.reach(int(row["step"])) - started
            scratch.remove()
            print(
                f"| {to} | {row['pause']:.3f} | {row['share']:.1%} | {alone:.1f} | {row['rate']:.1f} | "
                f"{row['lost']:.1f} | {row['down']:.2f} | **{row['back']:.2f}** | {row['worst']:.2f} | "
                f"**{again:.1f}** (start {cold:.1f}, then {row['step']:.0f} steps) |"
            )


if __name__ == "__main__":
    main()
