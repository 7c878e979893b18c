# SPDX-License-Identifier: Apache-2.0
"""Signals that wait until a step is done.

CRIU must not die in the middle of a dump: it would leave the container's network locked, and its own code in
the processes. Nor may a rollback be left half done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from cryoci import trace

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that would end this process are handled when the with block is left; blocks may nest."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), came[0])


def whole(argv: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """subprocess.run of a program that runs to its end, out of reach of the terminal's Ctrl-C too."""
    with deferred(), trace.call(argv) as traced:
        result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
        traced.status = result.returncode
    return result
