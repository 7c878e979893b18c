# SPDX-License-Identifier: Apache-2.0
"""What `cryoci-runtime checkpoint` does about CUDA, around the run of the real runtime.

After the driver's checkpoint nothing of a GPU is left in the processes, so CRIU sees ordinary memory and needs
no plugin; it gets an empty plugin directory, for CRIU's own CUDA plugin would interfere, and hides failures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cryoci.shim import paths
from cryoci.shim.argv import Invocation
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.gpu import below as runtime_below
from cryoci.shim.gpu import tasks
from cryoci.shim.gpu.hold import Hold, take
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime

if TYPE_CHECKING:
    from cryoci.shim.config import GpuSettings


class Dumping:
    """One dump. `held` are the container's CUDA processes; None when it has none."""

    in_criu = False  # the driver's work is done before CRIU's begins

    def __init__(self, held: Hold | None) -> None:
        self.held = held

    def options(self, chosen: CriuOptions) -> CriuOptions:
        """CRIU's options for this dump."""
        return chosen.merge(no_plugins()) if self.held is not None else chosen

    def variables(self) -> dict[bytes, bytes]:
        """Environment of the runtime: for crun, which hands CRIU no configuration."""
        if self.held is None:
            return {}
        return {b"CRIU_LIBS_DIR": os.fsencode(str(no_plugins().libdir))}


@contextmanager
def dumping(
    line: Invocation, below: Runtime, record: Record, *, images: str, settings: GpuSettings, criu: int
) -> Iterator[Dumping]:
    """Bring the container's CUDA processes out of their GPUs for a with block around the dump.

    Processes that the dump leaves alive, or that it failed on, go back to their GPUs afterwards: each is left in
    the state in which it was found. Raises what hold.take raises; nothing is held then.
    """
    pid = int(runtime_below.state(line, below).get("pid", 0))
    if pid <= 0 or not tasks.any_cuda(pid):
        yield Dumping(None)
        return
    held = take(
        record,
        pid,
        "checkpoint",
        lock_seconds=settings.lock_timeout,
        prefault=settings.prefault,
        images=images,
        running=lambda: runtime_below.thawed(line, below),
    )
    try:
        yield Dumping(held)
        if held is not None and os.path.isfile(images + "/inventory.img"):
            held.dump.criu = criu
            held.dump.write(images)
    finally:
        if held is not None:
            held.release()


def no_plugins() -> CriuOptions:
    """CRIU options that keep its plugins out. Raises OSError."""
    empty = paths.run_directory() + "/no-plugins"
    os.makedirs(empty, mode=0o700, exist_ok=True)
    return CriuOptions(libdir=empty)
