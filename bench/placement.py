#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the placement of memory rests on: each of its choices, measured alone, by the code that moves memory.

    python -m bench.placement --mib 1024 --disk DIR --tmpfs /dev/shm

A child of this program holds MIB of random memory. Capture: its chunk files, written through the page cache and past
it (O_DIRECT), durable at the end. Limits: what writing new and old pages of a tmpfs, new and old memory, and plain
copies cost without any of cryoci's code. Fill: into new memory, of 4 KiB pages and of huge pages. Cold reads: chunk
files that are not in the page cache, alone and after a head start of half a second, as CRIU's restore leaves. Drop:
madvise by one process and by several at once. Everything in turns; the median of the rounds, with the least and most.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import shutil
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cryoci.shim.memory import calls, capture, chunk, index, placement, prefetch, sums
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.settings import Settings
from cryoci.shim.record import Record

HUGE = 2 << 20
CHUNK = 64 << 20
PIECE = chunk.PIECE
PAGES = {
    "small": "4 KiB pages",
    "advised": "huge pages by MADV_HUGEPAGE",
    "collapsed": "huge pages by MADV_COLLAPSE",
}
HEAD_START = 0.5  # seconds
MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE = 4, 14, 15, 25
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Holder:
    """A child with `size` bytes of private memory, random if `full`, else absent; `advice` about its pages."""

    def __init__(self, size: int, *, full: bool, advice: int = 0) -> None:
        said, tell = os.pipe()
        self.asked, self._ask = os.pipe()
        self.said = said
        self.size = size
        self.pid = os.fork()
        if self.pid == 0:
            _hold(size, full, advice, self.asked, tell)
        os.close(tell)
        self.start = struct.unpack("Q", os.read(said, 8))[0]

    def drop(self) -> None:
        """Have it drop its memory; returns when it has."""
        os.write(self._ask, b"d")
        os.read(self.said, 1)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for fd in (self.said, self.asked, self._ask):
            os.close(fd)


def _hold(size: int, full: bool, advice: int, asked: int, tell: int) -> None:
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -(-first // HUGE) * HUGE
    if advice:
        _libc.madvise(start, size, advice)
    if full:
        tile = os.urandom(1 << 20)
        for at in range(0, size, len(tile)):
            memory[start - first + at : start - first + at + len(tile)] = tile
    os.write(tell, struct.pack("Q", start))
    while os.read(asked, 1):
        _libc.madvise(start, size, MADV_DONTNEED)
        os.write(tell, b"d")
    os._exit(0)


@contextmanager
def holding(size: int, *, full: bool, advice: int = 0) -> Iterator[Holder]:
    made = Holder(size, full=full, advice=advice)
    try:
        yield made
    finally:
        made.end()


def keys(holder: Holder) -> list[chunk.Key]:
    return [
        chunk.Key(1, holder.start + at, min(CHUNK, holder.size - at) // PAGE)
        for at in range(0, holder.size, CHUNK)
    ]


def spread(
    jobs: Sequence[object], threads: int, act: Callable[[object, chunk.Buffer], object]
) -> list[object]:
    """`act` on every job, with a buffer of its thread."""
    local = threading.local()

    def one(job: object) -> object:
        if not hasattr(local, "buffer"):
            local.buffer = chunk.Buffer()
        return act(job, local.buffer)

    return capture.each(one, jobs, threads)


def captured(
    holder: Holder, directory: Path, threads: int, *, direct: bool = False, kind: int = sums.NONE
) -> list[tuple[chunk.Key, str]]:
    """Capture a holder's memory; the keys and digests of its chunks."""
    pagemap = os.open(f"/proc/{holder.pid}/pagemap", os.O_RDONLY)
    where = os.open(directory, os.O_RDONLY)

    def act(key: object, buffer: chunk.Buffer) -> tuple[chunk.Key, str]:
        assert isinstance(key, chunk.Key)
        written = chunk.capture(where, key, holder.pid, pagemap, buffer, kind=kind, direct=direct)
        return key, written.digest

    try:
        return spread(keys(holder), threads, act)  # type: ignore[return-value]
    finally:
        os.close(pagemap)
        os.close(where)


def writes(holder: Holder, directory: Path, threads: int, *, direct: bool, kind: int = sums.NONE) -> float:
    start = time.perf_counter()
    captured(holder, directory, threads, direct=direct, kind=kind)
    took = time.perf_counter() - start
    capture.remove(str(directory))
    return took


def fills(directory: Path, done: list[tuple[chunk.Key, str]], size: int, how: str, threads: int) -> float:
    """Fill new memory of a child from chunk files; "huge": huge pages where a 2 MiB block is whole."""
    advice = MADV_HUGEPAGE if how == "advised" else MADV_NOHUGEPAGE if how == "small" else 0
    with holding(size, full=False, advice=advice) as target:
        moved = [chunk.Key(1, target.start + at, key.pages) for at, (key, _) in _offsets(done)]
        start = time.perf_counter()
        if how == "collapsed":
            collapse(target)
        where = os.open(directory, os.O_RDONLY)

        def act(number: object, buffer: chunk.Buffer) -> None:
            assert isinstance(number, int)
            key, digest = done[number]
            shift = moved[number].start - key.start
            with chunk.Reader(where, key, digest) as reader:
                for runs, _ in reader.pieces(buffer):
                    calls.write(target.pid, [(at + shift, n) for at, n in runs], buffer.address)

        try:
            spread(range(len(done)), threads, act)
        finally:
            os.close(where)
        return time.perf_counter() - start


def collapse(target: Holder) -> None:
    """Huge pages of what is still absent: one page of each block, then MADV_COLLAPSE from outside."""
    fd = os.pidfd_open(target.pid)
    buffer = chunk.Buffer()
    for at in range(0, target.size, CHUNK):
        size = min(CHUNK, target.size - at)
        for block in range(at, at + size, HUGE):
            calls.write(target.pid, [(target.start + block, PAGE)], buffer.address)
        vector = struct.pack("2Q", target.start + at, size)
        _libc.syscall(440, fd, vector, 1, MADV_COLLAPSE, 0)  # process_madvise
    os.close(fd)


def _offsets(done: list[tuple[chunk.Key, str]]) -> Iterator[tuple[int, tuple[chunk.Key, str]]]:
    at = 0
    for entry in done:
        yield at, entry
        at += entry[0].pages * PAGE


def returns(holder: Holder, directory: Path, threads: int, *, direct: bool) -> float:
    """Seconds of a capture and a fill from its files, as when the container lives on."""
    start = time.perf_counter()
    done = captured(holder, directory, threads, direct=direct)
    took = time.perf_counter() - start
    took += fills(directory, done, holder.size, "small", threads)
    capture.remove(str(directory))
    return took


def evict(directory: Path) -> None:
    """Take the files in a directory out of the page cache: these only."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cold(
    directory: Path, done: list[tuple[chunk.Key, str]], size: int, threads: int, *, ahead: bool
) -> float:
    """Seconds of a fill from a cold disk, half a second after a restore began."""
    evict(directory)
    record = Record(None, "bench")
    with prefetch.ahead(record, str(directory), Settings(prefetch=ahead)):
        time.sleep(HEAD_START)
    return fills(directory, done, size, "small", threads)


def drops(size: int, processes: int, *, together: bool) -> float:
    """Seconds in which so many processes give back `size` bytes in all."""
    made = [Holder(size // processes // HUGE * HUGE, full=True) for _ in range(processes)]
    try:
        start = time.perf_counter()
        if together:
            all_ = [threading.Thread(target=one.drop) for one in made]
            for thread in all_:
                thread.start()
            for thread in all_:
                thread.join()
        else:
            for one in made:
                one.drop()
        return time.perf_counter() - start
    finally:
        for one in made:
            one.end()


def copies(threads: int, size: int) -> float:
    """Seconds of memcpy of `size` bytes in all between warm buffers, larger than any cache."""
    half = min(CHUNK, size // threads)
    pairs = [(ctypes.create_string_buffer(half), ctypes.create_string_buffer(half)) for _ in range(threads)]
    for pair in pairs:
        ctypes.memset(pair[0], 1, half)
        ctypes.memset(pair[1], 1, half)

    def work(number: int) -> None:
        for _ in range(size // half // threads):
            ctypes.memmove(pairs[number][0], pairs[number][1], half)

    return _threads(work, threads)


def pages(directory: Path, threads: int, size: int, *, old: bool) -> float:
    """Seconds in which one warm buffer is written to `size` bytes of files; `old`: which have their pages."""
    part = size // threads // PIECE * PIECE
    paths = [directory / f"page-{n}" for n in range(threads)]

    def work(number: int) -> None:
        piece = mmap.mmap(-1, PIECE)
        piece.write(b"\1" * PIECE)
        fd = os.open(paths[number], os.O_RDWR | os.O_CREAT)
        for at in range(0, part, PIECE):
            os.pwrite(fd, piece, at)
        os.close(fd)

    if old:
        _threads(work, threads)
    took = _threads(work, threads)
    for path in paths:
        path.unlink()
    return took


def reads(holder: Holder, threads: int) -> float:
    """Seconds in which a holder's memory is read, and written nowhere."""

    def act(key: object, buffer: chunk.Buffer) -> None:
        assert isinstance(key, chunk.Key)
        for at in range(key.start, key.end, PIECE):
            calls.read(holder.pid, [(at, min(PIECE, key.end - at))], buffer.address)

    start = time.perf_counter()
    spread(keys(holder), threads, act)
    return time.perf_counter() - start


def _threads(work: Callable[[int], None], threads: int) -> float:
    all_ = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    start = time.perf_counter()
    for one in all_:
        one.start()
    for one in all_:
        one.join()
    return time.perf_counter() - start


class Table:
    """Rows that are measured in turns."""

    def __init__(self, title: str, size: int, rounds: int) -> None:
        self.title, self.size, self.rounds = title, size, rounds
        self.rows: list[tuple[str, Callable[[], float]]] = []

    def add(self, name: str, act: Callable[[], float]) -> None:
        self.rows.append((name, act))

    def show(self) -> None:
        """Measure and print: GB/s of the median, and of the slowest and fastest round."""
        found: list[list[float]] = [[] for _ in self.rows]
        for _ in range(self.rounds):
            for times, (_, act) in zip(found, self.rows, strict=True):
                times.append(act())
        print(f"\n| {self.title} | GB/s | range |\n|---|---:|---|")
        for times, (name, _) in zip(found, self.rows, strict=True):
            rates = [self.size / t / 1e9 for t in sorted(times, reverse=True)]
            print(
                f"| {name} | {statistics.median(rates):.2f} | {rates[0]:.2f} to {rates[-1]:.2f} |",
                flush=True,
            )


def measure(size: int, rounds: int, tmpfs: Path, disk: Path | None, counts: list[int]) -> None:
    """Print all tables."""
    most = max(counts)
    with holding(size, full=True) as source:
        table = Table("limits of this machine, none of cryoci's code", size, rounds)
        for n in counts:
            table.add(f"memcpy, {n} threads", partial(copies, n, size))
            table.add(f"read another process, {n} threads", partial(reads, source, n))
            for age in ("new", "old"):
                name = f"write {age} pages of a tmpfs, {n} threads"
                table.add(name, partial(pages, tmpfs, n, size, old=age == "old"))
        table.show()
        table = Table("capture to chunk files, durable", size, rounds)
        for n in counts:
            table.add(f"tmpfs, {n} threads", partial(writes, source, tmpfs, n, direct=False))
        for name, kind in sums.KINDS.items():
            if kind:
                act = partial(writes, source, tmpfs, most, direct=False, kind=kind)
                table.add(f"tmpfs, with {name}, {most} threads", act)
        for where in [disk] if disk else []:
            for n in counts:
                for how in ("buffered", "direct"):
                    act = partial(writes, source, where, n, direct=how == "direct")
                    table.add(f"disk, {how}, {n} threads", act)
        table.show()
        if disk:
            table = Table(f"capture to a disk and fill from there, {most} threads", size, rounds)
            for how in ("buffered", "direct"):
                table.add(how, partial(returns, source, disk, most, direct=how == "direct"))
            table.show()
            print(f"\nplacement.measure says: {placement.measure(str(disk))}", flush=True)
        done = captured(source, tmpfs, most)
        table = Table("fill of new memory from chunk files in a tmpfs", size, rounds)
        for n in counts:
            for how, says in PAGES.items():
                table.add(f"{says}, {n} threads", partial(fills, tmpfs, done, size, how, n))
        table.show()
        capture.remove(str(tmpfs))
        if disk:
            done = captured(source, disk, most)
            index.write(str(disk), {1: [(source.start, size)]}, done)
            title = f"fill from a cold disk, {most} threads, {HEAD_START} s after a restore began"
            table = Table(title, size, rounds)
            table.add("read when it is filled", partial(cold, disk, done, size, most, ahead=False))
            table.add("read ahead", partial(cold, disk, done, size, most, ahead=True))
            table.show()
            capture.remove(str(disk))
    table = Table("drop", size, rounds)
    table.add("one process", partial(drops, size, 1, together=False))
    table.add("four processes, one after another", partial(drops, size, 4, together=False))
    table.add("four processes at once", partial(drops, size, 4, together=True))
    table.show()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--tmpfs", default="/dev/shm", help="a directory on a tmpfs")
    parser.add_argument("--disk", help="a directory on a disk; none: nothing is written to one")
    args = parser.parse_args()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    print(
        f"{args.mib} MiB, {args.rounds} rounds, in turns; Linux {platform.release()}, {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}; huge pages: {huge}"
    )
    made = [
        Path(tempfile.mkdtemp(prefix="cryoci-bench.", dir=where))
        for where in (args.tmpfs, args.disk)
        if where
    ]
    try:
        disk = made[1] if len(made) > 1 else None
        measure(args.mib << 20, args.rounds, made[0], disk, sorted(set(args.threads)))
    finally:
        for one in made:
            shutil.rmtree(one, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
