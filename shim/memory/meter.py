# SPDX-License-Identifier: Apache-2.0
"""How far a capture or fill is, for whoever looks: a line in the container's record, `PHASE DONE TOTAL RUN`.

It is written at most ten times a second, in place, in /run: some 0.01 % of the time of what it tells of. No
descriptor, pipe or variable has to reach the runtime for it, which podman and containerd start through programs of
their own.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

NAME = "memory-progress"
_PERIOD = 0.1  # seconds
_LINE = "{:<8}{:>20}{:>20}{:>20}\n"


@dataclass(frozen=True)
class Reading:
    """What a meter said: bytes, and a number that tells it from the next one."""

    phase: str
    done: int
    total: int
    run: int


class Meter:
    """Tells in the record at `directory` how much of `total` bytes `phase` has moved, for a with block.

    Never raises: a meter that cannot be written is none. `add` may be called from any thread.
    """

    def __init__(self, directory: str, phase: str, total: int) -> None:
        self._path = f"{directory}/{NAME}"
        self._phase, self._total, self._done = phase, total, 0
        self._run = time.monotonic_ns()
        self._next = 0.0
        self._fd = -1
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        """`n` more bytes have moved."""
        with self._lock:
            self._done += n
            now = time.monotonic()
            if now >= self._next:
                self._next = now + _PERIOD
                self._write()

    def _write(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                line = _LINE.format(self._phase, self._done, self._total, self._run)
                os.pwrite(self._fd, line.encode(), 0)

    def __enter__(self) -> Meter:
        with suppress(OSError):
            os.unlink(self._path)  # of one that was killed
        with suppress(OSError):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._write()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                os.unlink(self._path)
            os.close(self._fd)


def read(directory: str) -> Reading | None:
    """What the meter in the record at `directory` says; None when there is none."""
    try:
        fd = os.open(f"{directory}/{NAME}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd) as f:
        try:
            phase, done, total, run = f.read(100).split()
            return Reading(phase, int(done), int(total), int(run))
        except (OSError, ValueError):
            return None
