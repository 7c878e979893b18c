#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process and its child that share no memory, and have so many MiB each (second argument): half noise, half text.

Answers as mosaic.py does.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys

from answers import answer  # type: ignore[import-not-found]  # beside it in the container


def main() -> None:
    me = "child" if os.fork() == 0 else "parent"
    size = int(sys.argv[2]) << 20
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, 1 << 20):
        noise = at // (1 << 20) % 2
        memory[at : at + (1 << 20)] = os.urandom(1 << 20) if noise else b"%016d" % at * (1 << 16)
    answer(
        me, lambda: {"digest": hashlib.sha256(memory).hexdigest(), "wrong": 0, "counts": [], "threads": 1}
    )


if __name__ == "__main__":
    main()
