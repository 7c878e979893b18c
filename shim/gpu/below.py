# SPDX-License-Identifier: Apache-2.0
"""The few calls of the real runtime that GPUs need around a dump and a restore."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cryoci.command import run
from cryoci.errors import CryociError
from cryoci.shim.argv import Invocation
from cryoci.shim.runtime import Runtime

_END = 10.0  # seconds that a killed container may take


def call(line: Invocation, below: Runtime, verb: str, *options: str) -> None:
    """Run `verb` of the runtime on the container of `line`. Raises ToolError."""
    run(_argv(line, below, verb, *options))


def state(line: Invocation, below: Runtime) -> dict[str, Any]:
    """The runtime's state of the container (runtime-spec, "State"); {} when it knows none."""
    result = run(_argv(line, below, "state"), check=False)
    try:
        value = json.loads(result.stdout) if result.returncode == 0 else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@contextmanager
def thawed(line: Invocation, below: Runtime) -> Iterator[None]:
    """A with block in which the container is not frozen: the driver needs the processes' own threads.

    CRI-O and `cryoci checkpoint` freeze before they dump. It is frozen again afterwards if it was.
    """
    frozen = state(line, below).get("status") == "paused"
    if frozen:
        call(line, below, "resume")
    try:
        yield
    finally:
        if frozen:
            call(line, below, "pause")


def signal(line: Invocation, below: Runtime, name: str) -> None:
    """Send a signal to the container's first process. Never raises."""
    try:
        run([*_argv(line, below, "kill"), name], check=False)
    except CryociError:
        pass


def kill(line: Invocation, below: Runtime) -> None:
    """End and delete a container whose restore failed half way. Never raises."""
    signal(line, below, "KILL")
    try:
        deadline = time.monotonic() + _END
        while state(line, below).get("status") not in (None, "stopped") and time.monotonic() < deadline:
            time.sleep(0.02)
        run(_argv(line, below, "delete", "--force"), check=False)
    except (CryociError, ValueError):
        pass


def _argv(line: Invocation, below: Runtime, verb: str, *options: str) -> list[str]:
    root = ["--root", line.root] if line.root else []
    return [below.path, *root, verb, *options, line.id or ""]
