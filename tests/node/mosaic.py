#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A process with memory of every shape, for tests of what moves it: run in a container.

Lays out random areas from a seed, forks, starts threads, and answers each /data/ask.N with /data/told.N: a
sha256 of all that it laid out, and whether its counters agree. A counter is kept twice, in a large area
that moves out of band and in a small one that CRIU carries: had an instruction run between
the two captures, they would differ.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import select
import signal
import sys
import threading
import time

from answers import answer  # type: ignore[import-not-found]  # beside it in the container

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.munmap.argtypes = libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PAGE = 4096
NONE, READ, WRITE = 0, 1, 3
PRIVATE, SHARED = 0x22, 0x21  # both anonymous
HUGE, NOHUGE, DONTFORK, WIPEONFORK, GUARD = 14, 15, 10, 18, 102


def area(size: int, protection: int = WRITE, kind: int = PRIVATE) -> int:
    address = libc.mmap(None, size, protection, kind, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return int(address)


def lay_out(dice: random.Random, mib: int) -> list[tuple[int, int, int]]:
    """(address, size, protection) of areas of about `mib` MiB in all."""
    found = []
    left = mib << 20
    while left > 0:
        size = min(dice.choice([1, 3, 8, 21, 64]) << 20, max(left, 1 << 20)) + dice.randrange(5) * PAGE
        left -= size
        kind = SHARED if dice.random() < 0.1 else PRIVATE
        address = area(size, kind=kind)
        if kind == PRIVATE and dice.random() < 0.3:
            libc.madvise(address, size, dice.choice([HUGE, NOHUGE]))
        tile = dice.randbytes(1 << 18)
        at = 0
        while at < size:
            run = min(dice.choice([1, 2, 7, 64, 600]) * PAGE, size - at)
            what = dice.random()
            if what < 0.55:
                text = (tile * (run // len(tile) + 1))[:run]
                ctypes.memmove(address + at, text, run)
                for page in range(at, at + run, PAGE):  # every page differs
                    ctypes.memmove(address + page, (address + page).to_bytes(8, "little"), 8)
            elif what < 0.7:
                ctypes.memset(address + at, 0, run)  # present, and zero
            elif what < 0.75:
                ctypes.string_at(address + at, run)  # the zero page
            at += run
        protection = WRITE
        if dice.random() < 0.2:
            protection = dice.choice([READ, NONE])
            first, last = sorted(dice.sample(range(0, size, PAGE), 2))
            if dice.random() < 0.5:  # a part of it: three areas
                libc.mprotect(address + first, last - first, protection)
                found += [(address, first, WRITE), (address + last, size - last, WRITE)]
                found.append((address + first, last - first, protection))
                continue
            libc.mprotect(address, size, protection)
        elif dice.random() < 0.15:  # a hole
            first, last = sorted(dice.sample(range(0, size, PAGE), 2))
            libc.munmap(address + first, last - first)
            found += [(address, first, WRITE), (address + last, size - last, WRITE)]
            continue
        elif dice.random() < 0.1:
            libc.mlock(address, min(size, 32 << 10))
        found.append((address, size, protection))
    return [(start, size, protection) for start, size, protection in found if size]


def digest(areas: list[tuple[int, int, int]]) -> str:
    total = hashlib.sha256()
    for address, size, protection in areas:
        if protection == NONE:
            libc.mprotect(address, size, READ)
        for at in range(0, size, 1 << 20):
            total.update(ctypes.string_at(address + at, min(1 << 20, size - at)))
        if protection == NONE:
            libc.mprotect(address, size, NONE)
    return total.hexdigest()


def guarded(size: int) -> tuple[list[tuple[int, int, int]], int]:
    """An area with a guard region in it, as stacks have one: what is around that, and where it is (Linux 6.13).

    It has no neighbours: the kernel would join them to one area, and none of it would move.
    """
    address = area(size + 2 * PAGE, NONE) + PAGE
    libc.mprotect(address, size, WRITE)
    ctypes.memset(address, 9, size)
    at = address + size // 2
    libc.madvise(at, PAGE, GUARD)
    return [(address, size // 2, WRITE), (at + PAGE, size // 2 - PAGE, WRITE)], at


def can_be_read(address: int) -> bool:
    into, out = os.pipe()
    try:
        return bool(libc.write(out, ctypes.c_void_p(address), 1) == 1)
    finally:
        os.close(into)
        os.close(out)


class Twins(threading.Thread):
    """Counts in a large area first, then in a small one, in bursts, with `pause` microseconds between them."""

    def __init__(self, large: int, small: int, burst: int, pause: int) -> None:
        super().__init__(daemon=True)
        self.burst, self.pause = burst, pause / 1e6
        self.large = ctypes.c_uint64.from_address(large)
        self.small = ctypes.c_uint64.from_address(small)
        self.wrong = 0

    def run(self) -> None:
        while True:
            for _ in range(self.burst):
                if self.large.value != self.small.value:
                    self.wrong += 1
                self.large.value += 1
                self.small.value += 1
            time.sleep(self.pause)


def wait_about(number: int) -> None:
    """Start a thread that waits for ever, in one of several system calls."""
    never, _ = os.pipe()
    waits = (
        lambda: time.sleep(3600),
        lambda: select.select([never], [], []),
        lambda: os.read(never, 1),
        threading.Event().wait,
        lambda: signal.sigtimedwait([signal.SIGUSR2], 3600),
    )
    threading.Thread(target=waits[number % len(waits)], daemon=True).start()


def main() -> None:
    seed, mib, threads, waiting, burst, pause = (int(word) for word in sys.argv[1:7])
    dice = random.Random(seed)
    areas = lay_out(dice, mib)
    huge = area(6 << 20)  # at least two huge pages
    libc.madvise(huge, 6 << 20, HUGE)
    ctypes.memmove(huge, dice.randbytes(6 << 20), 6 << 20)
    areas.append((huge, 6 << 20, WRITE))
    me = "parent"
    if os.fork() == 0:
        me = "child"
        for address, size, protection in areas[::2]:
            if protection == WRITE:  # no longer shared with the parent
                ctypes.memmove(address, b"child" * 100, min(500, size))
        areas += lay_out(random.Random(seed + 1), mib // 2)
    around, guard = guarded(4 << 20)
    areas += around
    large = area(8 << 20)
    ctypes.memset(large, 7, 8 << 20)
    ctypes.memset(large, 0, threads * PAGE)
    small = area(threads * PAGE)
    twins = [Twins(large + n * PAGE, small + n * PAGE, burst, pause) for n in range(threads)]
    for one in twins:
        one.start()
    for number in range(waiting):
        wait_about(number)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

    def told() -> dict[str, object]:
        return {
            "digest": f"{digest(areas)} {can_be_read(guard)}",
            "wrong": sum(one.wrong for one in twins),
            "counts": [one.large.value for one in twins],
            "threads": threading.active_count(),
        }

    answer(me, told, 0.005)


if __name__ == "__main__":
    main()
