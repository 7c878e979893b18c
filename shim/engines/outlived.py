# SPDX-License-Identifier: Apache-2.0
"""A container that ends between its dump and the end of its checkpoint: the checkpoint is all that is left of it."""

from __future__ import annotations

import json
from collections.abc import Callable

from cryoci.errors import CryociError
from cryoci.shim import record
from cryoci.shim.engines.container import Container
from cryoci.shim.memory import repair as memory


def goes_on(container: Container, thaw: Callable[[], None], warnings: list[str]) -> bool:
    """Let a dumped container run on by `thaw`; False, and a warning, when it has ended meanwhile.

    Raises what `thaw` raises when it has not.
    """
    try:
        thaw()
    except CryociError:
        if not ended(container):
            raise
        memory.repair(record.Record(container.root, container.id))  # its images are what has the memory
        warnings.append(
            f"container {container.name} has ended since it was dumped: `cryoci restore` brings it back"
        )
        return False
    return True


def ended(container: Container) -> bool:
    """Whether nothing of it runs any more."""
    result = container.call("state", check=False)
    return result.returncode != 0 or json.loads(result.stdout).get("status") == "stopped"
