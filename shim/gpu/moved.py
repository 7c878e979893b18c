# SPDX-License-Identifier: Apache-2.0
"""How far GPU memory is on its way to host memory or back, for whoever shows bars (shim/memory/meter.py).

The driver tells nothing of that. But on the way out the memory of the process grows by what it held, and on the way in
it shrinks by that again, so its resident memory is looked at. It is about right: pages that were faulted in ahead of
the driver (shim/gpu/prefault.py) count before they are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from cryoci.periodic import every
from cryoci.shim.gpu.tasks import Task
from cryoci.shim.memory.meter import Meter

LEAST = 32 << 20  # bytes on GPUs that are worth a bar
_PERIOD = 0.2  # seconds


@contextmanager
def told(directory: str, way: Literal["gpu-out", "gpu-in"], tasks: Sequence[Task]) -> Iterator[None]:
    """Tell in the container's record at `directory` what `tasks` move during a with block. Never raises by itself."""
    total = sum(sum(task.vram.values()) for task in tasks)
    if total < LEAST:
        yield
        return
    before = {task.pid: _resident(task.pid) for task in tasks}
    with Meter(directory, way, total) as meter:
        seen = 0

        def look() -> None:
            nonlocal seen
            here = sum(
                min(abs(_resident(task.pid) - before[task.pid]), sum(task.vram.values())) for task in tasks
            )
            if here > seen:
                meter.add(here - seen)
                seen = here

        try:
            with every(_PERIOD, look, "cryoci-gpu-moved"):
                yield
        finally:
            look()


def _resident(pid: int) -> int:
    """Bytes of anonymous memory that a process has resident; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as f:
            for line in f:
                if line.startswith(b"RssAnon:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 0
