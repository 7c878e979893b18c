# SPDX-License-Identifier: Apache-2.0
"""Compression that follows the link: `--compression auto`.

Frames are independent, so each may have its own level. Whoever makes a layer waits either for the compressor
or for the store; the level goes up while the compressor is never waited for (link or disk are the brake), and
down while it often is. The price: the same directory gives other digests each time, so this is not the default.
"""

from __future__ import annotations

import threading

LEVELS = (-20, -5, -1, 1, 3, 5, 7, 9)  # zstd; beyond 9 the gain on 2 MiB frames is under 2 %
START = LEVELS.index(1)
_WINDOW = 6  # frames per decision
_IDLE, _BUSY = (
    0.10,
    0.35,
)  # shares of the time spent waiting for the compressor: it has room; it is the brake


class Gauge:
    """Chooses the level of the next frame; all layers of an image share one, as they share both sides."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at = START
        self._frames = 0
        self._compressor = self._store = 0.0

    @property
    def level(self) -> int:
        """zstd's level for the next frame."""
        return LEVELS[self._at]

    def note(self, compressor: float, store: float) -> None:
        """One frame is gone: seconds spent waiting for the compressor, and for the store to take it."""
        with self._lock:
            self._compressor += compressor
            self._store += store
            self._frames += 1
            if self._frames < _WINDOW:
                return
            share = self._compressor / ((self._compressor + self._store) or 1.0)
            if share < _IDLE:
                self._at = min(self._at + 1, len(LEVELS) - 1)
            elif share > _BUSY:
                self._at = max(self._at - 1, 0)
            self._frames, self._compressor, self._store = 0, 0.0, 0.0
