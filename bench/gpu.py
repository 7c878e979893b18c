# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu [--gib 4 16] [--markdown FILE]`: the driver's checkpoint and restore against the PCIe limit.

As root on a machine with an NVIDIA GPU and PyTorch. All rows are of one run; GB/s are of what NVML says that the
processes hold. THP is the system's setting for transparent huge pages, which is put back afterwards.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoci.shim.gpu import engine, helper, nvml, tasks
from cryoci.shim.gpu.cuda import Driver

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FRONT = Path(__file__).resolve().parents[1] / "shim" / "gpu" / "front.py"
_HOLDER = """
import sys, time, torch
x = torch.randint(0, 255, (int(float(sys.argv[1]) * (1 << 30)),), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize(); print("ready", flush=True); time.sleep(3600)
"""
_PCIE = """
import time, torch
host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True); there = host.to("cuda")
for name, a, b in (("D2H", host, there), ("H2D", there, host)):
    best = 0
    for _ in range(5):
        torch.cuda.synchronize(); at = time.perf_counter(); a.copy_(b); torch.cuda.synchronize()
        best = max(best, (1 << 30) / (time.perf_counter() - at) / 1e9)
    print(name, round(best, 1))
"""


@contextmanager
def holders(count: int, gib: float) -> Iterator[list[int]]:
    """`count` processes that hold `gib` GiB of noise each on the GPU."""
    argv = [sys.executable, "-c", _HOLDER, str(gib)]
    made = [subprocess.Popen(argv, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in made:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield [process.pid for process in made]
    finally:
        for process in made:
            process.kill()
            process.wait()


@contextmanager
def thp(setting: str) -> Iterator[None]:
    """Transparent huge pages of the system for a with block."""
    before = THP.read_text().partition("[")[2].partition("]")[0]
    THP.write_text(setting)
    try:
        yield
    finally:
        THP.write_text(before)


def measure(driver: Driver, count: int, gib: float, runs: int) -> tuple[float, float, float, float]:
    """(GB held, seconds to lock, seconds of lock + checkpoint, seconds of restore + unlock), medians."""
    with holders(count, gib) as pids:
        time.sleep(1)
        with nvml.opened() as management:
            held = sum(sum(one.values()) for pid, one in management.used_by().items() if pid in pids) / 1e9

        def find() -> list[tasks.Task]:
            return [tasks.look(pid) for pid in pids]

        locks, out, back = [], [], []
        for _ in range(runs):
            at = time.perf_counter()
            for pid in pids:
                driver.lock(pid, 10_000)
            locks.append(time.perf_counter() - at)
            for pid in pids:
                driver.unlock(pid)
            at = time.perf_counter()
            found = engine.suspend(driver, find, lock_ms=10_000)
            out.append(time.perf_counter() - at)
            at = time.perf_counter()
            engine.resume(driver, found)
            back.append(time.perf_counter() - at)
        return held, statistics.median(locks), statistics.median(out), statistics.median(back)


def probes() -> list[str]:
    """What one question about the state of a process costs, in each of three ways."""
    rows = []

    def front(pid: int) -> object:
        words = [str(FRONT), "--get-state", "--pid", str(pid)]
        return subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    with holders(1, 0.1) as pids:
        helper.start()
        ways: dict[str, Callable[[int], object]] = {
            "in this process, library loaded": Driver().state,
            "through the helper": helper.RemoteDriver().state,
            "cuda-checkpoint --get-state (a process each)": front,
        }
        for name, ask in ways.items():
            spans = []
            for _ in range(30):
                at = time.perf_counter()
                ask(pids[0])
                spans.append(time.perf_counter() - at)
            rows.append(f"| {name} | {statistics.median(spans) * 1e3:.3f} |")
    return rows


def main() -> None:
    """Measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[4, 16])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    driver = Driver()
    with nvml.opened() as management:
        name, version = management.gpus()[0].name, management.driver
    said = subprocess.run([sys.executable, "-c", _PCIE], capture_output=True, check=True).stdout.decode()
    pcie = dict(line.split() for line in said.splitlines())
    lines = [
        f"{name}, driver {version}, {os.cpu_count()} CPUs, Linux {platform.release()}. Pinned copies in the same run: "
        f"{pcie['D2H']} GB/s to the host, {pcie['H2D']} GB/s to the GPU.",
        "",
        "| processes x GiB | THP | held, GB | lock, ms | lock + checkpoint, s | GB/s | restore + unlock, s | GB/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for gib in asked.gib:
        for count in (1, 4):
            for setting in ("madvise", "always"):
                with thp(setting):
                    held, lock, out, back = measure(driver, count, gib / count, asked.runs)
                lines.append(
                    f"| {count} x {gib / count:g} | {setting} | {held:.1f} | {lock * 1e3:.1f} | {out:.2f} | "
                    f"{held / out:.1f} | {back:.2f} | {held / back:.1f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", "| asking for the state of one process | ms (median of 30) |", "|---|---:|", *probes()]
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.markdown:
        asked.markdown.write_text(text)


if __name__ == "__main__":
    main()
