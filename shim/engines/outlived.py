# SPDX-License-Identifier: Apache-2.0
"""A container that ends between its dump and the end of its checkpoint: the checkpoint is all that is left of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from cryoci.errors import CryociError
from cryoci.shim import record
from cryoci.shim.engines.container import Container
from cryoci.shim.memory import find
from cryoci.shim.memory import repair as memory

_SETTLE = 5.0  # seconds


def goes_on(container: Container, thaw: Callable[[], None], warnings: list[str]) -> bool:
    """Let a dumped container run on by `thaw`; False, and a warning, when it has ended meanwhile.

    Raises what `thaw` raises when it has not.
    """
    try:
        thaw()
    except (CryociError, OSError):  # the latter when a process goes while it is looked at
        deadline = time.monotonic() + _SETTLE
        while not (ended(container) and _concluded(container)):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        warnings.append(
            f"container {container.name} has ended since it was dumped: `cryoci restore` brings it back"
        )
        return False
    return True


def _concluded(container: Container) -> bool:
    """Leave its memory to its images; False while one of its processes is still on its way out."""
    try:
        memory.repair(record.Record(container.root, container.id))
    except (CryociError, OSError):
        return False
    return True


def ended(container: Container) -> bool:
    """Whether nothing of it runs any more.

    Runtimes look at the freezer first: what was killed while frozen is paused for them for ever. It is thawed then.
    """
    result = container.call("state", check=False)
    said = json.loads(result.stdout) if result.returncode == 0 else {"status": "stopped"}
    if said.get("status") == "paused" and not find.runs(int(said.get("pid", 0))):
        container.call("resume", check=False)
        return False
    return said.get("status") == "stopped"
