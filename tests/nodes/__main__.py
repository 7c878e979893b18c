# SPDX-License-Identifier: Apache-2.0
"""`make node`: build what nodes are made of, and say where it is and how long it took."""

from __future__ import annotations

import sys
import time

from cryoci.errors import CryociError
from tests.nodes import cuda_plugin, kubectl, machine, services, tree, workload

STEPS = (
    ("tree", tree.debian),
    ("dependencies", tree.dependencies),
    ("cryoci", tree.checkout),
    ("workload", workload.layer),
    ("machine image", machine.image),
    ("services", services.debian),
    ("in Python", services.python),
    ("kubectl", kubectl.package),
    ("CUDA plugin", cuda_plugin.directory),
)


def main() -> int:
    try:
        for name, build in STEPS:
            began = time.monotonic()
            path = build()
            print(f"{name:14}{time.monotonic() - began:6.1f} s  {path.relative_to(tree.REPO)}", flush=True)
    except CryociError as e:
        print(f"make node: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
