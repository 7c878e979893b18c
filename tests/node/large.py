#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process and its child that share no memory, and have so many MiB each (second argument): half noise, half text.

Answers as mosaic.py does.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import time


def main() -> None:
    me = "child" if os.fork() == 0 else "parent"
    size = int(sys.argv[2]) << 20
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, 1 << 20):
        noise = at // (1 << 20) % 2
        memory[at : at + (1 << 20)] = os.urandom(1 << 20) if noise else b"%016d" % at * (1 << 16)
    done = 0
    while True:
        if os.path.exists(f"/data/ask.{done}"):
            told = {"digest": "", "wrong": 0, "counts": [], "threads": 1}
            told["digest"] = hashlib.sha256(memory).hexdigest()
            with open(f"/data/{me}.{done}.new", "w") as f:
                json.dump(told, f)
            os.rename(f"/data/{me}.{done}.new", f"/data/{me}.{done}")
            done += 1
        time.sleep(0.02)


if __name__ == "__main__":
    main()
