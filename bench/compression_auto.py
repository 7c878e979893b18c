# SPDX-License-Identifier: Apache-2.0
"""`--compression auto` against fixed levels, over links of several speeds.

    nice .venv/bin/python -m bench.compression_auto [--mib 128] [--json FILE]

A layer of varied memory (a quarter each of noise, floats, text and zeros) is packed and given to a taker that
hashes it, as every store does, and then takes as long as its link would. Results: docs/benchmarks/auto.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

from cryoci.ociimage import archive, frames, layers

LINKS = (10, 50, 200, 800, 0)  # MB/s; 0 is as fast as the machine
BUFFER = 0.05  # seconds of traffic that the link's buffers hold: a late taker does not leave it idle
CODECS = ("none", "zstd:-5", "zstd:1", "zstd:3", "zstd:9", "auto")


def memory(path: Path, mib: int) -> None:
    """So many MiB of varied memory."""
    source = random.Random(1)
    words = [bytes(source.choices(range(97, 123), k=source.randint(2, 9))) + b" " for _ in range(3000)]
    with open(path, "wb") as file:
        for _ in range(mib):
            text = b"".join(source.choices(words, k=50_000))[: 256 << 10]
            floats = b"".join(struct.pack("<d", source.gauss(0, 1)) for _ in range(8192)) * 4
            file.write(source.randbytes(256 << 10) + floats + text.ljust(256 << 10) + bytes(256 << 10))


def send(directory: Path, codec: str, rate: int) -> dict[str, Any]:
    """Pack `memory` over a link of `rate` MB/s; returns seconds and bytes."""
    file = archive.File("memory", (directory / "memory").stat().st_size)
    began = time.monotonic()
    size, due = 0, began
    digest = hashlib.sha256()
    with frames.Pool(layers.Compression.parse(codec)) as pool:
        for frame in layers.Writer(directory, layers.Plan("m", (file,)), pool, lambda n: None).open():
            digest.update(frame)
            size += len(frame)
            if rate:
                due = max(due, time.monotonic() - BUFFER) + len(frame) / rate / 1e6
                time.sleep(max(0.0, due - time.monotonic()))
        level = pool.gauge.level if pool.gauge else None
    return {"seconds": round(time.monotonic() - began, 2), "size": size, "last level": level}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the result here")
    words = parser.parse_args()
    result: dict[str, Any] = {"mib": words.mib, "load": os.getloadavg()[0], "rows": {}}
    with tempfile.TemporaryDirectory(prefix="cryoci-bench.") as made:
        directory = Path(made)
        memory(directory / "memory", words.mib)
        for rate in LINKS:
            row = {codec: send(directory, codec, rate) for codec in CODECS}
            result["rows"][str(rate or "none")] = row
            cells = " | ".join(
                f"{r['seconds']:.2f} s, {r['size'] / 1e6:.0f} MB"
                + (f", level {r['last level']}" if r["last level"] is not None else "")
                for r in row.values()
            )
            print(f"| {f'{rate} MB/s' if rate else 'as fast as it goes'} | {cells} |", flush=True)
    if words.json:
        words.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
