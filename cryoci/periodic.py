# SPDX-License-Identifier: Apache-2.0
"""Something done now and then, by a thread of its own, beside what a with block does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def every(period: float, act: Callable[[], None], name: str) -> Iterator[None]:
    """Call `act` each `period` seconds during a with block; after the block no call runs or begins."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(period):
            act()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
