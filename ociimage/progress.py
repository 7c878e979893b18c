# SPDX-License-Identifier: Apache-2.0
"""Progress: what long work tells its caller; every method may be called from any thread.

A `Work` makes the Progress of one piece of work for the time of a with block: bars on a terminal (cli/output.py), or
`lines` in the log of a daemon.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from cryoci.amounts import rate, seconds, size
from cryoci.periodic import every

PERIOD = 10.0  # seconds between two lines of a log
_LOOK = 0.5  # seconds between two looks at a directory that grows


class Progress(Protocol):
    """Receives bytes as they pass. A token is whatever `start` returns."""

    def start(self, name: str, total: int | None) -> object:
        """A part named `name` of `total` bytes (None: unknown) begins."""

    def advance(self, token: object, n: int) -> None:
        """`n` more bytes of the part passed; negative when a part begins anew after a lost connection."""

    def done(self, token: object) -> None:
        """The part is complete."""


Work = Callable[[str], AbstractContextManager[Progress]]


class Silent:
    """The Progress that says nothing."""

    def start(self, name: str, total: int | None) -> object:
        return None

    def advance(self, token: object, n: int) -> None:
        return None

    def done(self, token: object) -> None:
        return None


def silent(name: str) -> AbstractContextManager[Progress]:
    """The Work that says nothing."""
    return nullcontext(Silent())


def lines(say: Callable[[str], None], period: float = PERIOD) -> Work:
    """A Work that says a line every `period` seconds, and so none about what is done sooner."""
    return lambda name: nullcontext(_Lines(name, say, period))


class _Lines:
    """All parts of one piece of work together: bytes, of how many, how fast, how long it still takes."""

    def __init__(self, name: str, say: Callable[[str], None], period: float) -> None:
        self._name, self._say, self._period = name, say, period
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()
        self._passed = self._total = 0
        self._known = True

    def start(self, name: str, total: int | None) -> object:
        with self._lock:
            self._total += total or 0
            self._known = self._known and total is not None
        return None

    def advance(self, token: object, n: int) -> None:
        with self._lock:
            self._passed += n
            now = time.monotonic()
            if now - self._said < self._period:
                return
            self._said = now
            line = self._line(now - self._began)
        self._say(line)

    def done(self, token: object) -> None:
        return None

    def _line(self, spent: float) -> str:
        if not self._known or self._passed >= self._total:  # what was expected was only a guess
            return f"{self._name}: {size(self._passed)}, {rate(self._passed, spent)}"
        left = (
            f", {seconds((self._total - self._passed) * spent / self._passed)} left"
            if self._passed > 0
            else ""
        )
        return (
            f"{self._name}: {size(self._passed)} of {size(self._total)}, {rate(self._passed, spent)}{left}"
        )


@contextmanager
def growing(progress: Progress, directory: Path, total: int | None) -> Iterator[None]:
    """Tell how `directory` grows, which programs write to: about `total` bytes, None when nobody knows."""
    if isinstance(progress, Silent):
        yield
        return
    token = progress.start("", total)
    seen = 0

    def look() -> None:
        nonlocal seen
        here = _size(directory)
        progress.advance(token, here - seen)
        seen = here

    try:
        with every(_LOOK, look, "cryoci-progress"):
            yield
    finally:
        progress.done(token)


def _size(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_size
            except FileNotFoundError:
                continue  # it had another name a moment ago
    return total
