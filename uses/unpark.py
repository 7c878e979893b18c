# SPDX-License-Identifier: Apache-2.0
"""`cryoci unpark`: a container back to its GPUs, from host memory or from where `cryoci share` has stored it."""

from __future__ import annotations

import time
from collections.abc import Callable

from cryoci.errors import ConflictError
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import engines
from cryoci.shim.engines import gpu, processes
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.gpu import Parked
from cryoci.shim.gpu import dump, preflight
from cryoci.uses import leftover, share_shelf, share_tiers, stdio


def unpark(
    name: str,
    *,
    root: str | None = None,
    say: Callable[[str], None],
    registry: RegistryOptions | None = None,
    hooks: bool = True,
) -> Parked:
    """Bring it back, with or without its app hooks.

    Raises what unparking and a restore raise, and ConflictError while a share has it in hand.
    """
    made = share_shelf.stored(name) if root is None else None
    if made is None:
        return _here(engines.find(name, root=root), hooks)
    share_tiers.directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    with processes.lock(share_tiers.directory() / f"{name}.lock") as locked:
        if not locked:
            raise ConflictError(
                f"{name} is stored by a `cryoci share` that runs, which brings it back when somebody comes for it",
                hint="ask at its port, or end that daemon first",
            )
        shelf, began = share_shelf.Shelf(None, say, registry), time.monotonic()
        if shelf.settle(name) is None:
            return _here(engines.find(name), hooks)
        if not hooks:
            made.awake = None
        with stdio.own():  # the container must not get what its caller waits for the end of
            shelf.bring(made)
    vram = preflight.vram(dump.Dump.from_json(made.gpus).tasks) if made.gpus is not None else 0
    return Parked(name, "running", vram, True, {"restore": time.monotonic() - began})


def _here(container: Container, hooks: bool) -> Parked:
    """One that was never ended; a dump that a killed cryoci has left may still be at work on it."""
    leftover.settle(container)
    return gpu.unpark(container, hooks=hooks)
