# SPDX-License-Identifier: Apache-2.0
"""What a killed CRIU leaves: children of its own, and a runtime that waits for ever.

The runtime reads CRIU's answer from a socket, whose end it sees when nobody holds CRIU's side any more. A child that
CRIU has forked holds it too (a half restored container, a probe of the kernel), and sleeps until CRIU says go on. So
CRIU lies dead and not waited for below a runtime that reads. Its orphans are ended then: the runtime fails, and takes
back what it has made. Killed a little later CRIU leaves a container that is restored but that nobody has: that goes
as well.

Orphans come to the next subreaper above. For the time of an operation this process is one, to know them.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from cryoci.shim import cgroup, stalled
from cryoci.shim.memory import find

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_PATIENCE = 1.0  # seconds that a runtime has to notice a dead CRIU
_LONGER = 10.0  # seconds after which it is ended itself
_QUIET = 20  # looks without any CRIU: it has done its part
_SETTLE = 5.0  # seconds
_EXIT_CODE = 49  # in proc_pid_stat(5), from the state on


class Watch:
    """One run of a runtime, as a with block; `look` is for `child.run`. With `adopts` orphans come to this process.

    `killed` is the signal that has ended CRIU while the runtime waited for it, 0 if none has. `died` is the process of
    the container for which CRIU waited after it was dead, 0 if there was none (stalled.py).
    """

    def __init__(self, *, adopts: bool) -> None:
        self.killed = 0
        self._adopts = adopts
        self._before = set(cgroup.tree(os.getpid()))
        self._since: float | None = None
        self._quiet = 0
        self._stall = stalled.Stall()

    @property
    def died(self) -> int:
        return self._stall.died

    def __enter__(self) -> Watch:
        if self._adopts:
            _subreaper(True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._adopts:
            _subreaper(False)

    def look(self, runtime: int) -> bool:
        """Look at the runtime with that pid, and help it if it waits for a dead CRIU, or CRIU for a dead process.

        False when all is done.
        """
        below = cgroup.tree(runtime)[1:]
        criu = [pid for pid in below if _name(pid) == b"criu"]
        self._quiet = 0 if criu else self._quiet + 1
        number = next((n for pid in criu if (n := _ended_by(pid))), 0)
        now = time.monotonic()
        if not number:
            self._stall.look(criu)
            self._since = None
            return self._quiet < _QUIET
        if self._since is None:
            self._since = now
        elif now - self._since > _PATIENCE:
            self.killed = number
            _kill(self._orphans(runtime))
            if now - self._since > _LONGER:
                _kill([runtime])
        return True

    def sweep(self) -> None:
        """The operation has failed: end what is left of it, and remove its cgroup. Never raises."""
        left = self._orphans(0)
        homes = {cgroup.path_of(pid) for pid in left} - {None, cgroup.path_of(os.getpid())}
        _kill(left)
        deadline = time.monotonic() + _SETTLE
        while not all(_gone(pid) for pid in left) and time.monotonic() < deadline:
            time.sleep(0.01)
        for home in homes:
            cgroup.remove(home or "")

    def _orphans(self, runtime: int) -> list[int]:
        """Processes of CRIU and of the container that have come from the runtime."""
        mine = _space(os.getpid())
        new = (pid for pid in cgroup.tree(os.getpid()) if pid not in self._before and pid != runtime)
        # not a hook's daemon or cryoci's helper, which have come the same way
        return [pid for pid in new if _name(pid) == b"criu" or _space(pid) not in ("", mine)]


def _subreaper(on: bool) -> None:
    import ctypes  # as child.py

    ctypes.CDLL(None).prctl(_SUBREAPER, int(on), 0, 0, 0)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _gone(pid: int) -> bool:
    """Whether it has ended; if it is ours it is waited for."""
    with suppress(OSError):
        os.waitpid(pid, os.WNOHANG)
    return not find.runs(pid)


def _ended_by(pid: int) -> int:
    """The signal that has ended a process which nobody has waited for; 0 for any other."""
    try:
        fields = find.stat(f"/proc/{pid}/stat")
        return int(fields[_EXIT_CODE]) & 0x7F if fields[0] == "Z" else 0
    except (OSError, IndexError):
        return 0


def _name(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/comm", "rb") as f:
            return f.read().strip()
    except OSError:
        return b""


def _space(pid: int) -> str:
    """Its mount namespace; "" when it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""
