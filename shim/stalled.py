# SPDX-License-Identifier: Apache-2.0
"""A CRIU that waits for a process of the container which has died under it, and would do so for ever.

In a dump CRIU brings its code into each process, and waits in between for what it has the process do (wait4(2) of its
first thread). When the process dies meanwhile (at its memory limit, by `kill -9`) and has other threads, that wait
does not end: the kernel tells of a first thread only when all others have been waited for, and CRIU, which traces
them, would do that later. Such a CRIU is known by three things at once: for some seconds it has slept without using
the processor, it has no child at work, and a process that it traces is dead. SIGALRM is CRIU's own time limit
(criu/cr-dump.c): the call that it waits in ends, it takes its code out of the processes that live, and fails. One
that does not is killed.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from cryoci.shim import cgroup
from cryoci.shim.memory import find

_PATIENCE = 4.0  # seconds
_AGAIN = 8.0  # seconds that it has to end by itself after that
_FLAGS, _USED = 6, slice(11, 13)  # in proc_pid_stat(5), from the state on
_EXITING = 0x4  # PF_EXITING of the flags


def note(log: str, pid: int) -> None:
    """Add to CRIU's log for whom it waited: it cannot know. Never raises."""
    said = f"Error (cryoci): process {pid} died while CRIU was in it, and CRIU waited for it\n"
    with suppress(OSError):
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, said.encode())
        finally:
            os.close(fd)


class Stall:
    """What is seen of CRIU in one operation, look by look; `died` is the process that it waited for, 0 if none."""

    def __init__(self) -> None:
        self.died = 0
        self._criu = 0
        self._used: list[str] = []
        self._since = 0.0

    def look(self, running: list[int]) -> None:
        """Look at the CRIUs that a runtime has, and end one that waits for nobody. Never raises."""
        criu = running[-1] if running else 0
        used = _sleeps(criu)
        now = time.monotonic()
        if not used or (criu, used) != (self._criu, self._used):
            # one that was told to end works again, and is still told to be quick about it
            self._since = self._since if self.died and criu == self._criu else now
            self._criu, self._used = criu, used
        if self.died:
            if criu and now - self._since > _AGAIN:
                _send(criu, signal.SIGKILL)
        elif used and now - self._since > _PATIENCE and (dead := _dead_below(criu)):
            self.died, self._since = dead, now
            _send(criu, signal.SIGALRM if _catches(criu, signal.SIGALRM) else signal.SIGKILL)


def _sleeps(pid: int) -> list[str]:
    """What it has used of the processor, while it sleeps and has no children; [] for any other."""
    try:
        fields = find.stat(f"/proc/{pid}/stat") if pid else []
    except OSError:
        return []
    return fields[_USED] if fields and fields[0] == "S" and cgroup.tree(pid) == [pid] else []


def _dead_below(criu: int) -> int:
    """A process traced by it that is dead, or whose death waits for others to be dead (a PID namespace's first)."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError, IndexError, ValueError):
            if find.status(int(name)).get("TracerPid") == str(criu):
                fields = find.stat(f"/proc/{name}/stat")
                if fields[0] in "ZX" or int(fields[_FLAGS]) & _EXITING:
                    return int(name)
    return 0


def _catches(pid: int, number: int) -> bool:
    try:
        return bool(int(find.status(pid)["SigCgt"], 16) >> number - 1 & 1)
    except (OSError, KeyError, ValueError):
        return False


def _send(pid: int, number: int) -> None:
    with suppress(OSError):
        os.kill(pid, number)
