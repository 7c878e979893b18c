# SPDX-License-Identifier: Apache-2.0
"""`make node`: build what nodes are made of, and say where it is and how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cryoci.errors import CryociError
from tests.nodes import crit, cuda_plugin, kubectl, machine, services, tree, workload

Step = tuple[str, Callable[[], Path]]
# For two processors. What a step needs of the other lane, it waits for (tree.cached).
LANES: tuple[tuple[Step, ...], ...] = (
    (
        ("tree", tree.debian),
        ("dependencies", tree.dependencies),
        ("cryoci", tree.checkout),
        ("workload", workload.layer),
        ("machine image", machine.image),
    ),
    (
        ("services", services.debian),
        ("kubectl", kubectl.package),
        ("in Python", services.python),
        ("crit", crit.package),
        ("CUDA plugin", cuda_plugin.directory),
    ),
)


def build(lane: tuple[Step, ...]) -> None:
    for name, step in lane:
        began = time.monotonic()
        path = step()
        print(f"{name:14}{time.monotonic() - began:6.1f} s  {path.relative_to(tree.REPO)}", flush=True)


def main() -> int:
    try:
        with ThreadPoolExecutor(len(LANES)) as pool:
            list(pool.map(build, LANES))
    except CryociError as e:
        print(f"make node: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
