# SPDX-License-Identifier: Apache-2.0
"""App hooks around a checkpoint or a park, and what a restored container gets before its restore counts as done."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from cryoci.errors import CryociError, HookError
from cryoci.shim import app, inside
from cryoci.shim.engines import asleep
from cryoci.shim.engines import bare as bare_containers
from cryoci.shim.engines import podman as podman_containers
from cryoci.shim.engines.asleep import Asleep
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import Restored, RestoreOptions

_PERIOD = 0.02  # seconds


def due(container: Container, before: app.Hooks, was_paused: bool) -> app.Hooks:
    """`before`, without its steps when the container was parked with them. Raises HookError when they cannot run."""
    if was_paused and before.steps:
        if asleep.load(container) is not None:
            return app.Hooks(before.kind)
        raise HookError(
            f"container {container.name} is paused, so its pre-checkpoint hooks cannot run",
            hint="let it run first, or skip them with --no-hooks",
        )
    return before


def prepare(container: Container, before: app.Hooks, owed: Asleep, warnings: list[str]) -> None:
    """Have the application prepare itself, while it still runs; `owed` is noted. Raises HookError."""
    if container.status == "paused":  # by a cryoci that was killed
        container.call("resume")
    asleep.note(container, owed)
    warnings += app.run(container, before)


def settle(container: Container, owed: list[app.Hooks], warnings: list[str]) -> None:
    """Post-restore hooks, once, of a container that was never ended: it runs, so a failure is but told."""
    try:
        while owed:
            warnings += app.run(container, owed.pop())
    except CryociError as e:
        warnings.append(e.message)
    asleep.forget(container)


def podman(made: Restored, spec: dict[str, Any], options: RestoreOptions) -> None:
    """Run those of podman's container. Raises HookError."""
    hooks = app.hooks("post-restore", spec.get("annotations") or {}, options.hooks)
    if hooks.steps or options.hostname:
        _run(made, podman_containers.find(made.id), hooks, options.hostname)


def bare(options: RestoreOptions, made: Restored) -> None:
    """Run those that the bundle of a container of runc or crun asks for, or the caller. Raises HookError."""
    if options.hooks.off and not options.hostname:
        return
    container = bare_containers.find(made.id, options.root)
    noted = container.spec.get("annotations") if container else None
    hooks = app.hooks("post-restore", noted or {}, options.hooks)
    if hooks.steps or options.hostname:
        _run(made, container, hooks, options.hostname)


def _run(made: Restored, container: Container | None, hooks: app.Hooks, hostname: str | None) -> None:
    if container is None:
        raise HookError(f"container {made.name} has ended before its post-restore hooks could run")
    started = time.monotonic()
    if hostname:
        inside.set_hostname(int(container.state()["pid"]), hostname)
    made.warnings += app.run(container, hooks)
    made.seconds["post-restore hooks"] = time.monotonic() - started


def restored(process: subprocess.Popen[bytes], pid_file: Path) -> bool:
    """Wait until a restore in the foreground has made its container; False when it ended without."""
    while process.poll() is None:
        if pid_file.is_file() and pid_file.stat().st_size:
            return True
        time.sleep(_PERIOD)
    return False
