# SPDX-License-Identifier: Apache-2.0
"""What a killed daemon has left at work: the runtime's dump or restore goes on to its end without it."""

from __future__ import annotations

import time
from typing import Literal

from cryoci.command import at_work

_SECONDS = 60.0
_PERIOD = 0.05


def await_end(verb: Literal["checkpoint", "restore"], container_id: str, name: str) -> None:
    """Wait until nobody dumps (or restores) the container any more; a minute at most."""
    deadline = time.monotonic() + _SECONDS
    while _at_work(verb, container_id, name) and time.monotonic() < deadline:
        time.sleep(_PERIOD)


def _at_work(verb: str, container_id: str, name: str) -> bool:
    """Is there a process like `cryoci-runtime VERB ... ID`, or `podman container restore ... --name=NAME`?"""
    return any(
        verb in words and (words[-1] == container_id or f"--name={name}" in words) for words in at_work()
    )
