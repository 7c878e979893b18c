# SPDX-License-Identifier: Apache-2.0
"""The network namespace of a restored container.

Also a program, `python -m cryoci.shim.netns PID`: a process enters a network namespace as a whole, and the one
that restores must stay where it is. (pyroute2's NetNS forks for that, and a failure in its child would
run the rollback of a restore a second time.)
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from cryoci.command import run

T = TypeVar("T")
_TYPES = {"net": 0x40000000, "uts": 0x04000000}  # CLONE_NEWNET, CLONE_NEWUTS


def raise_loopback(pid: int) -> bool:
    """Bring `lo` up in the network namespace of `pid` unless it is this node's own; tells whether it did.

    runc has CRIU leave network namespaces empty (criu_linux.go, EmptyNs) and expects its caller to fill them;
    on create it raises `lo` itself. Raises OSError, ToolError.
    """
    if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
        return False
    run([sys.executable, "-m", "cryoci.shim.netns", str(pid)])
    return True


def within(pid: int, act: Callable[[], T], limit: float | None = None) -> T:
    """What `act` returns in the network namespace of `pid`: a thread enters it, this process stays where it is.

    What `act` opens stays open. Raises OSError, and what `act` raises; TimeoutError when it takes longer than `limit`
    seconds, and then goes on.
    """
    return within_path(f"/proc/{pid}/ns/net", "net", act, limit)


def within_path(path: str, kind: str, act: Callable[[], T], limit: float | None = None) -> T:
    """What `act` returns in the "net" or "uts" namespace at `path`, as in `within`."""
    made: list[T] = []
    failed: list[BaseException] = []

    def inside() -> None:
        try:
            _enter(path, kind)  # this thread alone, and for good
            made.append(act())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=inside, daemon=True)
    thread.start()
    thread.join(limit)
    if failed:
        raise failed[0]
    if not made:
        raise TimeoutError(f"it takes longer than {limit:g} s")
    return made[0]


def _enter(path: str, kind: str) -> None:
    import ctypes

    with open(path) as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _TYPES[kind]) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace at {path}")


def _main(pid: int) -> None:
    from pyroute2 import IPRoute

    _enter(f"/proc/{pid}/ns/net", "net")
    with IPRoute() as route:
        route.link("set", index=1, state="up")  # the first device of any namespace is lo


if __name__ == "__main__":
    _main(int(sys.argv[1]))
