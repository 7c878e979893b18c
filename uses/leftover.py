# SPDX-License-Identifier: Apache-2.0
"""What a killed daemon has left at work: the runtime's dump or restore goes on to its end without it."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from cryoci.command import at_work
from cryoci.errors import ConflictError
from cryoci.files import read_json
from cryoci.shim.engines import gpu, processes
from cryoci.shim.engines.container import Container
from cryoci.shim.memory import find
from cryoci.shim.record import Record

_SECONDS = 60.0
_PERIOD = 0.05


def await_end(verb: Literal["checkpoint", "restore"], container_id: str, name: str) -> None:
    """Wait until nobody dumps (or restores) the container any more; a minute at most."""
    deadline = time.monotonic() + _SECONDS
    while _at_work(verb, container_id, name) and time.monotonic() < deadline:
        time.sleep(_PERIOD)


def settle(container: Container) -> None:
    """Wait for what a killed cryoci has left at work on the container, and repair it. Raises what a repair raises."""
    held = Path(Record(container.root, container.id).directory) / processes.HELD
    try:
        owner = int(read_json(held)["pid"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        owner = 0
    if find.runs(owner):
        return  # its owner is at work; what is next says so
    await_end("checkpoint", container.id, container.name)
    with suppress(ConflictError):  # another cryoci is at it by now
        gpu.repair(container)


def _at_work(verb: str, container_id: str, name: str) -> bool:
    """Is there a process like `cryoci-runtime VERB ... ID`, or `podman container restore ... --name=NAME`?"""
    return any(
        verb in words and (words[-1] == container_id or f"--name={name}" in words) for words in at_work()
    )
