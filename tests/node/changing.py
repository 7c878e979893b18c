#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process with AREAS areas of 8 MiB that changes one of them when asked, for tests of what does not change.

/data/change.N has area N get another page; each answer, /data/told.N, is a sha256 of all of them.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import time
from pathlib import Path

SIZE = 8 << 20


def main() -> None:
    areas = [
        mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(int(sys.argv[1]))
    ]
    apart = [mmap.mmap(-1, 4096, prot=0, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in areas]
    for area in areas:
        for at in range(0, SIZE, 1 << 20):
            area[at : at + (1 << 20)] = os.urandom(1 << 20)
    asked = 0
    while apart:
        question = Path(f"/data/ask.{asked}")
        if question.exists() and (text := question.read_text()).endswith("\n"):
            for number in text.split():
                areas[int(number)][:4096] = os.urandom(4096)
            total = hashlib.sha256()
            for area in areas:
                total.update(area)
            Path("/data/new").write_text(total.hexdigest())
            os.rename("/data/new", f"/data/told.{asked}")
            asked += 1
        time.sleep(0.01)


if __name__ == "__main__":
    main()
