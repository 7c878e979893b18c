# SPDX-License-Identifier: Apache-2.0
"""Applications that were asked to prepare themselves, and not yet to come back: the note that says so.

It is written before pre-checkpoint hooks run. Whoever finds it when the container is to run on (unpark, repair)
does the post-restore hooks that it holds; a note about another process than the container's is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryoci.files import read_json, write_json
from cryoci.shim import app
from cryoci.shim.engines.container import Container
from cryoci.shim.gpu import tasks
from cryoci.shim.record import Record

_NAME = "asleep.json"  # in a container's record


@dataclass(frozen=True)
class Asleep:
    """What is owed: `after`, and room for `vram` bytes by UUID of the GPU, which it held when it was awake."""

    after: app.Hooks
    vram: Mapping[str, int] = field(default_factory=dict)


def note(container: Container, what: Asleep) -> None:
    """Write it, for the container's process of now. Raises OSError, NotFoundError."""
    path = _path(container)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    init = tasks.look(int(container.state().get("pid", 0)))
    after = {
        "steps": [step.text for step in what.after.steps],
        "timeout": what.after.timeout,
        "ignore": what.after.ignore,
    }
    owner = {"pid": init.pid, "start": init.start}
    write_json(path, {"version": 1, "init": owner, "after": after, "vram": dict(what.vram)})


def load(container: Container) -> Asleep | None:
    """What is owed to the container that is there now; None when nothing is."""
    try:
        value = read_json(_path(container))
        owner, after = value["init"], value["after"]
        if not tasks.Task(int(owner["pid"]), int(owner["start"]), 0, "").alive:
            return None
        steps = tuple(app.step(str(text), "its note") for text in after["steps"])
        hooks = app.Hooks("post-restore", steps, float(after["timeout"]), bool(after["ignore"]))
        return Asleep(hooks, {str(uuid): int(used) for uuid, used in value["vram"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def forget(container: Container) -> None:
    """It is awake, or gone."""
    _path(container).unlink(missing_ok=True)


def wake(container: Container, owed: Asleep | None) -> list[str]:
    """Do what is owed, and forget it; returns what failed and was to be ignored. Raises HookError; it is owed then."""
    said = app.run(container, owed.after) if owed is not None else []
    forget(container)
    return said


def _path(container: Container) -> Path:
    return Path(Record(container.root, container.id).directory) / _NAME
