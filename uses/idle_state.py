# SPDX-License-Identifier: Apache-2.0
"""What `cryoci idle` knows of each of its containers: /run/cryoci/idle/NAME.json, for its status and its restart."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from cryoci.errors import UsageError
from cryoci.files import read_json
from cryoci.shim import paths
from cryoci.uses.guard_state import start_time

VERSION = 1


@dataclass
class State:
    """One container. `pid` and `started` are the daemon's, `of` its first process and when that started.

    `state` is running, parked or gone; `used` when it was used last (Unix time), `why` what by; `problem`: why that
    cannot be told, so it is not parked. `at` is where its clients come in.
    """

    name: str
    pid: int
    started: int
    of: tuple[int, int]
    after: float
    at: str = ""
    state: str = "running"
    used: float = 0.0
    why: str = ""
    problem: str = ""
    parks: int = 0
    rested: bool = False

    @property
    def alive(self) -> bool:
        """Does the daemon run?"""
        return self.pid > 0 and start_time(self.pid) == self.started

    def save(self) -> None:
        """Write it. No fsync: it is worth nothing after a reboot. Raises OSError."""
        place = directory()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = place / f".{self.name}.{os.getpid()}"
        fresh.write_text(json.dumps({"version": VERSION, **dataclasses.asdict(self)}) + "\n")
        fresh.rename(place / f"{self.name}.json")


def directory() -> Path:
    """Where the states are."""
    return Path(paths.run_directory()) / "idle"


def load(name: str) -> State | None:
    """The state of container `name`; None without one that can be understood. Raises UsageError for no name."""
    if not paths.valid_id(name):
        raise UsageError(f"{name!r} is not a name of a container", hint="see `cryoci ps`")
    try:
        value = read_json(directory() / f"{name}.json")
        if value.pop("version") != VERSION:
            return None
        pid, started = value.pop("of")
        return State(of=(int(pid), int(started)), **value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # the daemon that comes next writes it anew


def every_state() -> list[State]:
    """The states of all containers, by name."""
    found = []
    for file in sorted(directory().glob("[!.]*.json")) if directory().is_dir() else []:
        state = load(file.stem)
        if state is not None:
            found.append(state)
    return found
