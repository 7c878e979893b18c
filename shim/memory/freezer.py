# SPDX-License-Identifier: Apache-2.0
"""The container's freezer (cgroup v2) and stops by signal, seen from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable

from cryoci.errors import CheckpointError, UnsupportedError
from cryoci.shim.memory import find

_MOUNT = "/sys/fs/cgroup"
_SECONDS = 10.0
_STOPPED = frozenset("Tt")


class Freezer:
    """The freezer of the cgroup at `path` below the cgroup mount."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def of(cls, pid: int) -> Freezer:
        """That of a process. Raises UnsupportedError where there is none."""
        with open(f"/proc/{pid}/cgroup") as f:
            for line in f:
                path = line[3:].rstrip("\n")
                if line.startswith("0::/") and os.access(f"{_MOUNT}{path}/cgroup.freeze", os.W_OK):
                    return cls(path)
        raise UnsupportedError(
            "the container's cgroup has no freezer of version 2", hint='set [memory] engine = "criu" here'
        )

    @property
    def frozen(self) -> bool:
        """Whether it has been asked to freeze. Raises OSError."""
        with open(f"{_MOUNT}{self.path}/cgroup.freeze") as f:
            return f.read().strip() == "1"

    def set(self, frozen: bool) -> None:
        """Freeze and wait until all is frozen, or thaw. Raises OSError, CheckpointError."""
        with open(f"{_MOUNT}{self.path}/cgroup.freeze", "w") as f:
            f.write("1" if frozen else "0")
        if frozen:
            await_(self._is_frozen, "the container's processes do not freeze")

    def _is_frozen(self) -> bool:
        with open(f"{_MOUNT}{self.path}/cgroup.events") as f:
            return "frozen 1" in f.read()


def await_(true: Callable[[], bool], what: str) -> None:
    """Wait until `true()`. Raises CheckpointError."""
    end = time.monotonic() + _SECONDS
    while not true():
        if time.monotonic() > end:
            raise CheckpointError(
                f"{what} within {_SECONDS:g} s", hint="see the state of its processes (ps)"
            )
        time.sleep(0.001)


def stopped(pid: int) -> bool:
    """Whether no thread of a process can run before it gets SIGCONT. Raises OSError."""
    if find.states(pid) <= _STOPPED:
        return True
    return bool(int(find.status(pid)["ShdPnd"], 16) & 1 << (signal.SIGSTOP - 1))


def stop(pids: Iterable[int]) -> None:
    """Send SIGSTOP. Raises OSError."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def await_stopped(pids: Iterable[int]) -> None:
    """Wait until all threads of all processes are stopped. Raises OSError, CheckpointError."""
    for pid in pids:
        await_(lambda pid=pid: find.states(pid) <= _STOPPED, f"process {pid} does not stop")  # type: ignore[misc]


def proceed(pids: Iterable[int]) -> None:
    """Send SIGCONT to those that are still there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue
