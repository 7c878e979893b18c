# SPDX-License-Identifier: Apache-2.0
"""Bars for memory that the runtime or the GPU's driver moves, below podman or this process (shim/memory/meter.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cryoci.ociimage.progress import Progress
from cryoci.periodic import every
from cryoci.shim import remains
from cryoci.shim.memory import meter

_PERIOD = 0.1  # seconds
_NAMES = {"gpu-out": "GPU memory to the host", "gpu-in": "GPU memory back to the GPU"}


@contextmanager
def shown(progress: Progress | None, directory: str | None = None) -> Iterator[None]:
    """Show what the runtime moves during the with block on `progress` (None: nothing is looked at).

    `directory` is the container's record; None for a container that is only being made, under an id that its engine
    chooses: whatever begins to move on this node is shown then.
    """
    if progress is None:
        yield
        return
    watch = _Watch(progress, directory)
    try:
        with every(_PERIOD, watch.look, "cryoci-moving"):
            yield
    finally:
        watch.end()


class _Watch:
    def __init__(self, progress: Progress, directory: str | None) -> None:
        self._progress, self._directory = progress, directory
        # of others, or of one that was killed
        self._before = {found.run for found in self._readings().values()}
        self._bars: dict[str, tuple[meter.Reading, object]] = {}

    def look(self) -> None:
        """See how far what moves is."""
        self._look(self._readings())

    def end(self) -> None:
        """Nothing moves any more."""
        self._look({})

    def _readings(self) -> dict[str, meter.Reading]:
        places = [self._directory] if self._directory else remains.directories()
        return {place: found for place in places if (found := meter.read(place)) is not None}

    def _look(self, now: dict[str, meter.Reading]) -> None:
        for place, (last, token) in list(self._bars.items()):
            if place not in now or now[place].run != last.run:
                self._progress.done(token)
                del self._bars[place]
        for place, found in now.items():
            if found.run in self._before:
                continue
            last, token = self._bars.get(place) or (
                meter.Reading(found.phase, 0, found.total, found.run),
                self._progress.start(_NAMES.get(found.phase, f"memory: {found.phase}"), found.total),
            )
            self._progress.advance(token, found.done - last.done)
            self._bars[place] = found, token
