#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process and its child with one area of the same place: of one page in the one, whole in the other.

So the child's goes out of band, and the parent's does not. Answers as mosaic.py does.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time

SIZE = 8 << 20


def area() -> mmap.mmap:
    made = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.write(os.urandom(SIZE))
    return made


def main() -> None:
    common = area()
    me = "parent"
    if os.fork() == 0:
        me = "child"
        common.seek(0)
        common.write(os.urandom(SIZE))  # nothing of it is shared any more
    else:
        common.madvise(mmap.MADV_DONTNEED, mmap.PAGESIZE, SIZE - mmap.PAGESIZE)
    areas = [common, area()]
    done = 0
    while True:
        if os.path.exists(f"/data/ask.{done}"):
            told = {"digest": "", "wrong": 0, "counts": [], "threads": 1}
            told["digest"] = hashlib.sha256(b"".join(one[:] for one in areas)).hexdigest()
            with open(f"/data/{me}.{done}.new", "w") as f:
                json.dump(told, f)
            os.rename(f"/data/{me}.{done}.new", f"/data/{me}.{done}")
            done += 1
        time.sleep(0.02)


if __name__ == "__main__":
    main()
