# SPDX-License-Identifier: Apache-2.0
"""Signals as exceptions: SIGTERM and SIGHUP unwind like Ctrl-C, so that everything is rolled back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def unwinding() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit for the time of a with block."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {n: signal.signal(n, unwind) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is unwind:
                signal.signal(number, handler)


def settle() -> None:
    """Ignore, until this process ends, the signals that would end it: what it had to do is done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
