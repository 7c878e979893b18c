# SPDX-License-Identifier: Apache-2.0
"""Stop a command of cryoci at a named point in a node, so that somebody can be killed there.

The cryoci that is installed in the node halts at a point when it is asked to (`Points.halt`), and tells its pid.
CRIU is stopped when its log has a line. docs/crash-matrix.md says what the points are.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.nodes import tree
from tests.nodes.namespace import NamespaceNode

# Point -> module of cryoci.shim, function, and whether before or after it.
POINTS = {
    "indexing": ("memory.index", "write", "before"),
    "indexed": ("memory.index", "write", "after"),
    "injecting": ("memory.inject", "_put_back", "before"),
    "half": ("memory.inject", "drop", "after"),
    "dropped": ("memory.dump", "take_out", "after"),
    "dumped": ("memory.dump", "conclude", "before"),
    "held": ("engines.checkpoint", "_describe", "before"),
    "ending": ("engines.checkpoint", "_end", "before"),
    "viewed": ("memory.guard", "view", "after"),
    "filling": ("memory.fill", "fill", "after"),
    "brought": ("memory.chain", "_bring", "after"),
}
STATES = ("captured", "dropping", "restoring", "filled")  # the journal has been written
# Point -> what CRIU's log says there.
CRIU_POINTS = {
    "seizing": r"Seized task",
    "infecting": r"syscall_ip at",
    "dumping": r"Dumping pages",
    "making": r"Forking task",
    "mapping": r"Restore via sigreturn",
}
_HALT = """
import functools, os, sys, time
def cryoci_halts(place):
    try:
        with open("/srv/halt") as f:
            if f.read() != place:
                return
        os.unlink("/srv/halt")
    except FileNotFoundError:
        return
    with open("/srv/halted.new", "w") as f:
        f.write(str(os.getpid()))
    os.rename("/srv/halted.new", "/srv/halted")
    while not os.path.exists("/srv/go"):
        time.sleep(0.002)
def cryoci_wraps(name, before=None, after=None):
    owner, _, attribute = name.rpartition(".")
    owner = globals()[owner] if owner else sys.modules[__name__]
    call = getattr(owner, attribute)
    @functools.wraps(call)
    def wrapped(*a, **k):
        cryoci_halts(before)
        result = call(*a, **k)
        cryoci_halts(after or getattr(a[0], "state", None))
        return result
    setattr(owner, attribute, wrapped)
"""

LOOK = 0.0005  # seconds between two looks for a CRIU; without them a whole processor would look


class Halted:
    """A command that stands at a point; `pid` is the process that does, as the node counts.

    `criu` is its number on the host when it is CRIU, else 0.
    """

    def __init__(
        self, node: NamespaceNode, process: subprocess.Popen[bytes], pid: int, criu: int = 0
    ) -> None:
        self.node, self.process, self.pid, self.criu = node, process, pid, criu
        self.gone = False

    def kill(self, pid: int) -> None:
        """kill -9 of a process of the node."""
        self.node.run(["kill", "-KILL", str(pid)])
        self.gone = pid == self.pid

    def end(self) -> str:
        """Let it go on, and wait until nothing of it runs any more; returns what it said."""
        if self.criu:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.criu, signal.SIGCONT)
        self.node.path("/srv/go").touch()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.node.run(["pkill", "-KILL", "-f", "^criu|/usr/sbin/runc|launcher.py"], check=False)
            raise
        at_work = ["pgrep", "-f", "launcher.py (checkpoint|restore) |^criu swrk"]
        end = time.monotonic() + 20
        while self.node.run(at_work, check=False).stdout and time.monotonic() < end:
            time.sleep(0.02)
        if self.criu and self.gone:  # CRIU was killed: cryoci-runtime has ended what it left
            assert self.node.run(["pgrep", "-af", "^criu"], check=False).stdout == b""
        self.node.run(["pkill", "-KILL", "-f", "^criu"], check=False)
        said = b""
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)  # a restored container has it as well
            said += stream.read() or b""
        return said.decode(errors="replace")


class Points:
    """The points of one node."""

    def __init__(self, node: NamespaceNode) -> None:
        self.node = node
        node.write("/srv/points.py", _HALT)
        lines = {"memory.journal": ['cryoci_wraps("Journal.write")']}
        for place, (module, name, when) in POINTS.items():
            lines.setdefault(module, []).append(f"cryoci_wraps({name!r}, {when}={place!r})")
        for module, found in lines.items():
            path = f"{tree.SITE}/cryoci/shim/{module.replace('.', '/')}.py"
            text = "\n".join(['exec(open("/srv/points.py").read())', *found, ""])
            node.run(["/bin/sh", "-c", 'cat >>"$1"', "sh", path], input=text.encode())

    def halt(self, argv: list[str], place: str, log: str = "") -> Halted:
        """Run a command up to a point; `log` is where CRIU's will be. Raises AssertionError if it ends before."""
        self.node.sh("rm -f /srv/go /srv/halt /srv/halted")
        if place in CRIU_POINTS:
            process = self.node.popen(argv)
            criu = self._stop_criu(process, log, CRIU_POINTS[place])
            return Halted(self.node, process, self._inside(criu), criu)
        self.node.write("/srv/halt", place)
        process = self.node.popen(argv)
        path = self.node.path("/srv/halted")
        _await(path.exists, process, place, 0.002)
        return Halted(self.node, process, int(path.read_text()))

    def _stop_criu(self, process: subprocess.Popen[bytes], log: str, wanted: str) -> int:
        """Stop the CRIU that speaks to the runtime; returns its pid on the host."""
        found, before = [0], processes()

        def said() -> bool:
            if not os.path.exists(f"/proc/{found[0]}"):  # before, runtimes ask one for its version
                found[:] = serving(self.node.pid, before) or [0]
                if not found[0]:
                    time.sleep(LOOK)
                    return False
            with contextlib.suppress(OSError):
                for path in self.node.path("/").glob(log.lstrip("/")):
                    return bool(found[0] and re.search(wanted, path.read_text(errors="replace")))
            return False

        _await(said, process, wanted, 0)
        os.kill(found[0], signal.SIGSTOP)
        return found[0]

    @staticmethod
    def _inside(pid: int) -> int:
        """A pid of the host as the node counts."""
        status = Path(f"/proc/{pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def processes() -> set[str]:
    """The processes of the host, as /proc names them."""
    return {entry for entry in os.listdir("/proc") if entry.isdigit()}


def serving(init: int, before: set[str]) -> list[int]:
    """Pids on the host of the CRIUs that serve a runtime in the pid namespace of `init`, oldest first.

    What was there `before` is not looked at: whoever waits for a CRIU asks a thousand times a second.
    """
    space = os.readlink(f"/proc/{init}/ns/pid")
    found = []
    for entry in processes() - before:
        with contextlib.suppress(OSError):
            if (
                Path(f"/proc/{entry}/comm").read_text() == "criu\n"
                and os.readlink(f"/proc/{entry}/ns/pid") == space
            ):
                found.append(int(entry))
    return sorted(found)


def _await(true: Callable[[], bool], process: subprocess.Popen[bytes], what: str, pause: float) -> None:
    end = time.monotonic() + 30
    while not true():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"it did not get to {what!r}: {process.communicate()}")
        time.sleep(pause)
