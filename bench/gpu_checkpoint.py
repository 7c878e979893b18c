# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu_checkpoint [--gib 12 40]`: a whole GPU container to tmpfs and back, by each way of memory.

As root on a machine with an NVIDIA GPU, PyTorch, criu and runc (tests/gpu/kit.py). In one run, in turns: CRIU
carries the memory (the plain path), then cryoci does, with digests of each kind and without, and without faulting
in the driver's memory ahead of it. The machine's memory is used once first, as some virtual machines get it from their
host only then. Every step prints at once. `--huge`: the images go to a tmpfs of huge pages.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cryoci.shim.gpu import nvml, preflight
from tests.gpu.machine import BASE, CONFIG, Node, Trainer

WAYS = {  # what follows CONFIG, whose last table is [gpu]
    "CRIU": "prefault = false\n",
    "parallel, xxh3, no prefault": 'prefault = false\n[memory]\nengine = "parallel"\ndigest = "xxh3"\n',
    "parallel": '[memory]\nengine = "parallel"\n',
    "parallel, xxh3": '[memory]\nengine = "parallel"\ndigest = "xxh3"\n',
    "parallel, no digests": '[memory]\nengine = "parallel"\ndigest = "none"\n',
}


_TOUCH = """
import mmap, sys
m = mmap.mmap(-1, int(sys.argv[1]))
m.madvise(mmap.MADV_HUGEPAGE)
m.madvise(23)  # MADV_POPULATE_WRITE
"""

PHASES = {  # of a timeline: the column, and the span whose name begins so
    "driver out": "driver: checkpoint of",
    "capture": "memory: capture",
    "drop": "memory: drop",
    "fill": "memory: fill",
    "driver in": "driver: restore of",
}


def used_once() -> str:
    """Use nine tenths of the free memory and let go of it; returns how fast that was."""
    count, size = 16, int(preflight.available_memory() * 0.9)
    at = time.monotonic()
    argv = [sys.executable, "-c", _TOUCH, str(size // count // 4096 * 4096)]
    for one in [subprocess.Popen(argv) for _ in range(count)]:
        one.wait()
    seconds = time.monotonic() - at
    return f"{size / 1e9:.0f} GB of memory used once in {seconds:.1f} s, {size / seconds / 1e9:.1f} GB/s"


def phases(*timelines: str) -> str:
    """Cells of PHASES: seconds, and GB/s where bytes are known."""
    steps = [step for name in timelines for step in json.loads(Path(name).read_text())["steps"]]
    cells = []
    for start in PHASES.values():
        found = [step for step in steps if step["name"].startswith(start)]
        seconds, size = sum(s["seconds"] for s in found), sum(s.get("bytes") or 0 for s in found)
        rate = f" ({size / seconds / 1e9:.1f})" if seconds > 0.05 and size else ""
        cells.append(f"{seconds:.1f}{rate}" if found else "")
    return " | ".join(cells)


def measure(way: str, gib: float, timelines: Path) -> dict[str, Any]:
    """One checkpoint and restore of a training container that holds `gib` GiB; seconds and GB."""
    node = Node("runc")
    config = BASE / "config.bench.toml"
    config.write_text(CONFIG.format(below="runc") + WAYS[way])
    node.environment["CRYOCI_CONFIG"] = str(config)
    trainer = Trainer(node, "bench", "--gib", str(gib)).start()
    where = BASE / "bench.checkpoint"
    try:
        with nvml.opened() as management:
            held = sum(management.used_by()[trainer.pid].values()) / 1e9
        name = f"{timelines}/{way.replace(', ', '-').replace(' ', '-')}-{gib:g}"
        at = time.monotonic()
        said = node.cryoci(
            *("checkpoint", "bench", "--rootfs", "none", "-o", str(where), "--json"),
            *("--timeline", f"{name}-checkpoint.json"),
        ).stdout
        out = time.monotonic() - at
        steps = json.loads(said)["seconds"]
        at = time.monotonic()
        trainer.restore(str(where), "--timeline", f"{name}-restore.json")
        back = time.monotonic() - at
        return {
            "way": way,
            "GB": held,
            "checkpoint": out,
            "gpu": steps["gpu"],
            "dump": steps["dump"],
            "restore": back,
            "phases": phases(f"{name}-checkpoint.json", f"{name}-restore.json"),
        }
    finally:
        trainer.remove()
        shutil.rmtree(where, ignore_errors=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, nargs="+", default=[12, 40])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--timelines", type=Path, default=Path("/tmp"), help="where the timelines go")
    parser.add_argument("--huge", action="store_true", help="a tmpfs of huge pages")
    parser.add_argument(
        "--used-once", action=argparse.BooleanOptionalAction, default=True, help="use all memory once before"
    )
    asked = parser.parse_args()
    if asked.huge:
        BASE.mkdir(parents=True, exist_ok=True)
        options = "size=60%,huge=always"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(BASE)], check=True)
    for _ in range(4 if asked.used_once else 0):  # it may grow by that
        print(used_once(), file=sys.stderr, flush=True)
        if preflight.available_memory() > 2.5 * max(asked.gib) * (1 << 30):
            break
    with nvml.opened() as management:
        lines = [
            f"{management.gpus()[0].name}, driver {management.driver}, Linux {platform.release()}; runc, tmpfs",
            "",
            "| on the GPU, GB | memory by | checkpoint, s | the driver, s | the dump, s | restore and two steps, s | "
            + " | ".join(f"{name}, s (GB/s)" for name in PHASES)
            + " |",
            "|---:|---|" + "---:|" * (4 + len(PHASES)),
        ]
    for gib in asked.gib:
        for way in asked.ways:
            row = measure(way, gib, asked.timelines)
            lines.append(
                f"| {row['GB']:.1f} | {way} | {row['checkpoint']:.1f} | {row['gpu']:.1f} | {row['dump']:.1f} | "
                f"{row['restore']:.1f} | {row['phases']} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
            if asked.markdown:
                asked.markdown.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
