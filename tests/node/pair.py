#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process and its child with one area of the same place: of one page in the one, whole in the other.

So the child's goes out of band, and the parent's does not. Answers as mosaic.py does.
"""

from __future__ import annotations

import hashlib
import mmap
import os

from answers import answer  # type: ignore[import-not-found]  # beside it in the container

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

    def told() -> dict[str, object]:
        digest = hashlib.sha256(b"".join(one[:] for one in areas)).hexdigest()
        return {"digest": digest, "wrong": 0, "counts": [], "threads": 1}

    answer(me, told)


if __name__ == "__main__":
    main()
