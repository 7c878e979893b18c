# SPDX-License-Identifier: Apache-2.0
"""When a container is ready: a command in it succeeds, a port or URL answers, its log says so."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cryoci.amounts import seconds
from cryoci.errors import ConflictError, UsageError
from cryoci.ociimage.progress import PERIOD
from cryoci.shim import app, inside
from cryoci.uses.bake_start import Start

_PERIOD = 0.1  # seconds between two looks
_ONE = 10.0  # seconds that one look may take


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


def wait(
    start: Start, checks: Sequence[Check], timeout: float, say: Callable[[str], None] = lambda line: None
) -> None:
    """Wait until the container fulfils all `checks`, in order; `say` hears of a wait that is long.

    Raises ConflictError with the container's last words when it ends before, or does not within `timeout` seconds.
    """
    began = told = time.monotonic()
    deadline = began + timeout
    for check in checks:
        while not _fulfilled(start, check):
            if time.monotonic() > deadline:
                raise ConflictError(
                    f"container {start.name} was not ready within {timeout:g} s ({check}); it said: {_words(start)}",
                    hint="give it more time (--ready-timeout), or correct the condition",
                )
            if time.monotonic() - told >= PERIOD:
                told = time.monotonic()
                say(f"{start.name} is not ready after {seconds(told - began)}: {check}")
            time.sleep(_PERIOD)


def _fulfilled(start: Start, check: Check) -> bool:
    pid, ended = start.look()
    if ended:
        raise ConflictError(
            f"container {start.name} ended before it was ready, {ended}; it said: {_words(start)}",
            hint="run it by hand: see that it starts",
        )
    if check.kind == "port":
        return inside.answers(pid, int(check.value), _ONE)
    if check.kind == "http":
        return inside.request(pid, "GET", check.value, _ONE) == ""
    if check.kind == "log":
        return re.search(check.value, start.log()) is not None
    return app.execute(start.container(), tuple(shlex.split(check.value)), _ONE) == ""


def _words(start: Start) -> str:
    return " / ".join(start.log(5).strip().splitlines()) or "nothing"
