# SPDX-License-Identifier: Apache-2.0
"""Who starts a container that is to be baked, looks at it, and removes it: podman, or a runtime with a bundle."""

from __future__ import annotations

import collections
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from cryoci.command import run, which
from cryoci.errors import ConflictError, NotFoundError, ToolError
from cryoci.shim.engines import bare, podman
from cryoci.shim.engines.container import Container, runtime_argv

_LOG_LINES = 2000


class Start(Protocol):
    """A container that is started, and removed at the end if it was started here. `name` is its name."""

    name: str

    def start(self) -> None:
        """Start it. Raises ConflictError when that name is taken, ToolError, NotFoundError."""

    def look(self) -> tuple[int, str]:
        """Its first process, and "" while it runs, else how it ended."""

    def log(self, lines: int = _LOG_LINES) -> str:
        """The end of what it has printed."""

    def container(self) -> Container:
        """The container. Raises NotFoundError."""

    def remove(self) -> None:
        """Leave nothing of it."""


class Podman:
    """`podman run OPTIONS --name=NAME IMAGE COMMAND`."""

    def __init__(self, name: str, options: Sequence[str], image: str, command: Sequence[str]) -> None:
        self.name = name
        self._words = [*options, image, *command]
        self._was_there = False

    def start(self) -> None:
        which("podman")
        argv = ["podman", "container", "exists", "--", self.name]
        self._was_there = run(argv, check=False).returncode == 0  # podman refuses ours then
        argv = ["podman", "run", "--detach", "--quiet", f"--name={self.name}", *self._words]
        run(argv, hint="it is podman that refused: the same command by hand says more")

    def look(self) -> tuple[int, str]:
        form = "--format={{.State.Pid}} {{.State.Status}} {{.State.ExitCode}}"
        asked = run(["podman", "container", "inspect", form, self.name])
        pid, status, code = asked.stdout.decode().split()
        return int(pid), "" if status == "running" else f"with exit code {code}"

    def log(self, lines: int = _LOG_LINES) -> str:
        argv = ["podman", "logs", f"--tail={lines}", "--", self.name]
        return run(argv, check=False, stderr=subprocess.STDOUT).stdout.decode(errors="replace")

    def container(self) -> Container:
        found = podman.find(self.name)
        if found is None:
            raise NotFoundError(f"container {self.name} was removed while it was baked")
        return found

    def remove(self) -> None:
        if not self._was_there:
            run(["podman", "rm", "--force", "--time=0", "--volumes", "--", self.name], check=False)


class Bundle:
    """`cryoci-runtime run` of an OCI bundle, by the configured runtime; what it prints is read from a pipe."""

    def __init__(self, name: str, bundle: Path) -> None:
        self.name = name
        self._bundle = bundle
        self._started = False
        self._said: collections.deque[bytes] = collections.deque(maxlen=_LOG_LINES)

    def start(self) -> None:
        if bare.find(self.name, None) is not None:
            raise ConflictError(f"a container {self.name} exists on this node", hint="give another --name")
        ours, theirs = os.pipe()
        threading.Thread(target=self._read, args=(os.fdopen(ours, "rb"),), daemon=True).start()
        argv = runtime_argv(None, "run", "--detach", "--bundle", str(self._bundle), self.name)
        self._started = True
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        finally:
            os.close(theirs)
        if done.returncode != 0:
            raise ToolError(
                f"the container could not be started from {self._bundle}: {self.log(5).strip()}",
                hint="run it by hand: see that it starts",
            )

    def look(self) -> tuple[int, str]:
        found = bare.find(self.name, None)
        state = found.state() if found is not None else {}
        status = str(state.get("status", "gone"))
        return int(state.get("pid", 0)), "" if status == "running" else f"and is {status}"

    def log(self, lines: int = _LOG_LINES) -> str:
        return b"".join(list(self._said)[-lines:]).decode(errors="replace")

    def container(self) -> Container:
        found = bare.find(self.name, None)
        if found is None:
            raise NotFoundError(f"container {self.name} was removed while it was baked")
        return found

    def remove(self) -> None:
        if self._started:
            subprocess.run(
                runtime_argv(None, "delete", "--force", self.name),
                stdin=subprocess.DEVNULL,
                capture_output=True,
            )

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in iter(lambda: pipe.readline(1 << 16), b""):
                self._said.append(line)
