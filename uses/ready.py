# SPDX-License-Identifier: Apache-2.0
"""When a container is ready: a command in it succeeds, a port or URL answers, its log says so."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryoci.command import run
from cryoci.errors import ConflictError, NotFoundError, UsageError
from cryoci.shim import app, inside
from cryoci.shim.engines import podman

_PERIOD = 0.1  # seconds between two looks
_ONE = 10.0  # seconds that one look may take
_LOG_LINES = 2000


@dataclass(frozen=True)
class Check:
    """One condition. `value` is a command line, a port, a URL or a regular expression. Raises UsageError."""

    kind: Literal["command", "port", "http", "log"]
    value: str

    def __post_init__(self) -> None:
        try:
            if self.kind == "command" and not shlex.split(self.value):
                raise ValueError("it is empty")
            if self.kind == "port" and not 0 < int(self.value) < 65536:
                raise ValueError("a port is 1 to 65535")
            if self.kind == "log":
                re.compile(self.value)
            if self.kind == "http":
                inside.check_url("GET", self.value)
        except (ValueError, re.error) as e:
            raise UsageError(
                f"--ready-{self.kind} {self.value!r}: {e}", hint="see `cryoci bake --help`"
            ) from e

    def __str__(self) -> str:
        return f"--ready-{self.kind} {shlex.quote(self.value)}"


def wait(name: str, checks: Sequence[Check], timeout: float) -> None:
    """Wait until the podman container `name` fulfils all `checks`, in order.

    Raises ConflictError with the container's last words when it ends before, or does not within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    for check in checks:
        while not _fulfilled(name, check):
            if time.monotonic() > deadline:
                raise ConflictError(
                    f"container {name} was not ready within {timeout:g} s ({check}); it said: {_words(name)}",
                    hint="give it more time (--ready-timeout), or correct the condition",
                )
            time.sleep(_PERIOD)


def _fulfilled(name: str, check: Check) -> bool:
    asked = run(
        [
            "podman",
            "container",
            "inspect",
            "--format={{.State.Pid}} {{.State.Status}} {{.State.ExitCode}}",
            name,
        ]
    )
    pid, status, code = asked.stdout.decode().split()
    if status != "running":
        raise ConflictError(
            f"container {name} ended before it was ready, with exit code {code}; it said: {_words(name)}",
            hint="run it by hand: see that it starts",
        )
    if check.kind == "port":
        return inside.answers(int(pid), int(check.value), _ONE)
    if check.kind == "http":
        return inside.request(int(pid), "GET", check.value, _ONE) == ""
    if check.kind == "log":
        return re.search(check.value, _log(name, _LOG_LINES)) is not None
    container = podman.find(name)
    if container is None:
        raise NotFoundError(f"container {name} is gone")
    return app.execute(container, tuple(shlex.split(check.value)), _ONE) == ""


def _log(name: str, lines: int) -> str:
    argv = ["podman", "logs", f"--tail={lines}", "--", name]
    return run(argv, check=False, stderr=subprocess.STDOUT).stdout.decode(errors="replace")


def _words(name: str) -> str:
    return " / ".join(_log(name, 5).strip().splitlines()) or "nothing"
