# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.gpu_checkpoint [--gib 12 40]`: a whole GPU container to tmpfs and back, by each way of memory.

As root on a machine with an NVIDIA GPU, PyTorch, criu and runc (tests/gpu/kit.py). In one run, in turns: CRIU
carries the memory (the plain path), then cryoci does, with and without digests. Every step prints at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from cryoci.shim.gpu import nvml
from tests.gpu.machine import BASE, CONFIG, Node, Trainer

WAYS = {
    "CRIU": "",
    "parallel": '[memory]\nengine = "parallel"\n',
    "parallel, xxh3": '[memory]\nengine = "parallel"\ndigest = "xxh3"\n',
    "parallel, no digests": '[memory]\nengine = "parallel"\ndigest = "none"\n',
}


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
    asked = parser.parse_args()
    with nvml.opened() as management:
        lines = [
            f"{management.gpus()[0].name}, driver {management.driver}, Linux {platform.release()}; runc, tmpfs",
            "",
            "| on the GPU, GB | memory by | checkpoint, s | the driver, s | the dump, s | restore and two steps, s |",
            "|---:|---|---:|---:|---:|---:|",
        ]
    for gib in asked.gib:
        for way in asked.ways:
            row = measure(way, gib, asked.timelines)
            lines.append(
                f"| {row['GB']:.1f} | {way} | {row['checkpoint']:.1f} | {row['gpu']:.1f} | {row['dump']:.1f} | "
                f"{row['restore']:.1f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
            if asked.markdown:
                asked.markdown.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
