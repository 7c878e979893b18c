# SPDX-License-Identifier: Apache-2.0
"""How a capture or fill moves memory on this node: threads, page cache or not, and why.

What config.toml leaves open ("auto") is chosen from the CPUs, the free memory, and, for a capture to a disk that is
large enough to be worth it, a few MiB written both ways. The choice stands in the timeline, and in the container's
record (`cryoci debug`).
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cryoci.files import read_json, write_json
from cryoci.shim.hostmemory import available_memory as available_memory
from cryoci.shim.memory import sums
from cryoci.shim.memory.settings import Settings
from cryoci.shim.record import Record

NAME = "memory-placement.json"
WORTH = (
    512 << 20
)  # bytes from which on a capture is measured for: the measurement takes some 20 ms of its pause
_MEMORY = ("tmpfs", "ramfs")
_PIECE, _PIECES = 1 << 20, 4
_BETTER = 1.3  # what is not in the page cache is read from the disk again by a push
_ENOUGH = 0.8  # and when memory is short, it is not there either way


@dataclass(frozen=True)
class Plan:
    """`settings` with nothing left open; `why` of each choice, by its key; `seen`: what was measured."""

    settings: Settings
    why: dict[str, str]
    seen: dict[str, float | str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The choices and their reasons for people."""
        return "; ".join(f"{key} {value}: {self.why[key]}" for key, value in self.chosen.items())

    @property
    def chosen(self) -> dict[str, int | str]:
        """What was chosen, as config.toml has it."""
        names = {number: name for name, number in sums.KINDS.items()}
        found = {key: getattr(self.settings, key) for key in self.why}
        return {key: names[value] if key == "digest" else value for key, value in found.items()}

    def keep(self, record: Record, phase: str) -> None:
        """Note it in the record. Never raises."""
        note(record, phase, {"chosen": self.chosen, "why": self.why, "seen": self.seen})


def note(record: Record, phase: str, value: dict[str, Any]) -> None:
    """Put what was chosen for a phase into the record. Never raises."""
    path = f"{record.directory}/{NAME}"
    try:
        known = read_json(path)
        known[phase] = value
    except (OSError, ValueError, TypeError):
        known = {phase: value}
    with suppress(OSError):
        write_json(path, known)


def for_capture(directory: str, size: int, settings: Settings, *, returns: bool = False) -> Plan:
    """How to write about `size` bytes to `directory`; `returns`: they are read from there soon. Raises OSError."""
    kind, spare = file_system(directory), available_memory()
    threads, because = _threads(size, settings)
    why = {"threads": because, "write": "as configured", "digest": "as configured"}
    seen: dict[str, float | str] = {"file system": kind, "memory available": spare}
    write = settings.write
    if kind in _MEMORY:
        write, why["write"] = "buffered", f"{kind} is the page cache"
    elif write == "direct" and not _takes_direct(directory):
        write, why["write"] = "buffered", f"{kind} there takes no O_DIRECT"
    elif write == "auto" and size < WORTH:
        write, why["write"] = "buffered", f"less than {WORTH >> 20} MiB"
    elif write == "auto" and returns and spare >= size:
        write, why["write"] = "buffered", "the memory comes back from there"
    elif write == "auto":
        rates = measure(directory)
        seen |= {f"{how} GB/s": round(rate, 3) for how, rate in rates.items()}
        write, why["write"] = _faster(rates, short=spare < size)
    return Plan(dataclasses.replace(settings, threads=threads, write=write), why, seen)


def for_fill(size: int, settings: Settings) -> Plan:
    """How to read about `size` bytes and write them to memory."""
    threads, because = _threads(size, settings)
    why = {"threads": because}
    return Plan(
        dataclasses.replace(settings, threads=threads), why, {"memory available": available_memory()}
    )


def in_memory(directory: str) -> bool:
    """Whether files in `directory`, which may have to be made yet, take this node's memory. Raises OSError."""
    directory = os.path.abspath(directory)
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    return file_system(directory) in _MEMORY


def file_system(directory: str) -> str:
    """Type of the file system that holds `directory`, "unknown" when it cannot be told (proc_pid_mountinfo(5))."""
    device = os.stat(directory).st_dev
    wanted, found = f"{os.major(device)}:{os.minor(device)}", "unknown"
    with suppress(OSError), open("/proc/self/mountinfo", errors="surrogateescape") as f:
        for line in f:
            fields = line.split(" ")
            if fields[2] == wanted:
                found = fields[fields.index("-", 6) + 1]
    return found


def measure(directory: str) -> dict[str, float]:
    """GB/s of a few MiB that become durable in `directory`, "buffered" and "direct" (0.0: not possible).

    The better of two each, in turns: the first write of a file system is slow. Never raises: what is wrong with the
    directory the capture says.
    """
    best = {"buffered": 0.0, "direct": 0.0}
    with mmap.mmap(-1, _PIECE) as piece:
        piece.write(os.urandom(4096) * (_PIECE // 4096))
        for how in (*best, *best):
            fd = _scratch(directory, direct=how == "direct")
            if fd < 0:
                continue
            try:
                start = time.perf_counter()
                done = sum(os.pwrite(fd, piece, at * _PIECE) for at in range(_PIECES))
                os.fsync(fd)
                best[how] = max(best[how], done / (time.perf_counter() - start) / 1e9)
            except OSError:
                best[how] = 0.0
                break
            finally:
                os.close(fd)
    return best


def _threads(size: int, settings: Settings) -> tuple[int, str]:
    if settings.threads is not None:
        return settings.threads, "as configured"
    files = max(1, -(-size // settings.chunk))
    if files < settings.workers:
        return files, f"for {size >> 20} MiB"
    return settings.workers, f"of {os.cpu_count()} CPUs"


def _faster(rates: dict[str, float], *, short: bool) -> tuple[str, str]:
    buffered, direct = rates["buffered"], rates["direct"]
    if not direct:
        return "buffered", "there is no O_DIRECT"
    said = f"{direct:.2f} GB/s direct, {buffered:.2f} through the page cache"
    if short and direct >= buffered * _ENOUGH:
        return "direct", f"{said}, and memory is short"
    return ("direct" if direct >= buffered * _BETTER else "buffered"), said


def _takes_direct(directory: str) -> bool:
    fd = _scratch(directory, direct=True)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def _scratch(directory: str, *, direct: bool) -> int:
    """An open file in `directory` without a name; -1 when the file system cannot have it so."""
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        return os.open(directory, flags, 0o600)
    except OSError:
        return -1
