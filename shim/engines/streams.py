# SPDX-License-Identifier: Apache-2.0
"""Standard files that a restored bare container gets from whoever restores it.

runc and crun hand theirs to it, and CRIU cannot dump a file, a device (/dev/null too), a terminal or the journal's
socket of this node again ("Can't lookup mount"). Pipes it can: behind each a `cat` carries on to the goal.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

_DRAIN_SECONDS = 5.0

# It outlives whoever asked it to stop, and its service's control group: the container would get SIGPIPE. So it does
# when there is nowhere to write to any more: a terminal that was closed, a disk that is full.
_RELAY = """
trap '' TERM INT HUP
echo 0 > /sys/fs/cgroup/cgroup.procs
cat || exec cat > /dev/null
"""


@dataclass
class Streams:
    """Descriptors for the container; `relays` are the programs behind them."""

    stdin: int
    stdout: int
    stderr: int
    ends: ExitStack
    relays: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def drain(self) -> None:
        """Nobody will write any more: wait until all that was written has arrived."""
        self.ends.close()
        for relay in self.relays:
            try:
                relay.wait(_DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                continue  # somebody else still holds the pipe


@contextmanager
def lasting(*, quiet: bool = False) -> Iterator[Streams]:
    """What the container gets, for the time of a with block: this process' own where they are pipes, else new pipes.

    With `quiet` what it says is read and thrown away, as of one whose first standard files are gone.
    """
    with ExitStack() as ends:
        made = Streams(0, 1, 2, ends)
        if quiet or not _is_pipe(0):
            made.stdin, end = os.pipe()
            os.close(end)
            ends.callback(os.close, made.stdin)
        leads: dict[tuple[int, int], int] = {}  # stdout and stderr that are one file stay one, in order
        for fd in (1, 2):
            if quiet or not _is_pipe(fd):
                key = (0, 0) if quiet else _identity(fd)
                if key not in leads:
                    drain, leads[key] = os.pipe()
                    ends.callback(os.close, leads[key])
                    made.relays.append(relay(drain, subprocess.DEVNULL if key == (0, 0) else fd))
                    os.close(drain)
                if fd == 1:
                    made.stdout = leads[key]
                else:
                    made.stderr = leads[key]
        yield made


def relay(source: int, goal: int) -> subprocess.Popen[bytes]:
    """A `cat` from pipe `source` to descriptor `goal` that ends with the last who writes."""
    return subprocess.Popen(
        ["sh", "-c", _RELAY],
        stdin=source,
        stdout=goal,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def _is_pipe(fd: int) -> bool:
    """An anonymous one: a FIFO is a file of this node."""
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
    except OSError:
        return False


def _identity(fd: int) -> tuple[int, int]:
    """Device and inode; 0, 0 for a closed one."""
    try:
        found = os.fstat(fd)
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
