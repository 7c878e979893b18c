# SPDX-License-Identifier: Apache-2.0
"""What a guard knows: one small file, /var/lib/cryoci/guard/NAME/state.json, written before and after each act.

A guard that was killed goes on from it, and `cryoci guard status` reads it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoci.errors import ConfigError, NotFoundError, UsageError
from cryoci.files import read_json, write_json
from cryoci.shim import paths

VERSION = 1
_HISTORY = 100  # recoveries that are remembered


@dataclass
class Kept:
    """One checkpoint of a guard. `where` is a directory, or HOST/REPO@DIGEST; times in seconds (Unix), size in bytes.

    `suspect`: a container that was restored from it has crashed at once, or it could not be restored. `shared` bytes
    of it are an earlier checkpoint's, too.
    """

    number: int
    where: str
    taken: float
    pause: float
    size: int
    suspect: bool = False
    shared: int = 0


@dataclass
class Recovery:
    """One crash and what came of it, in seconds: `lost` work since the checkpoint, `down` until it ran again.

    Pauses for checkpoints are no work.
    """

    at: float
    number: int
    lost: float
    down: float


@dataclass
class State:
    """A guard of container `name`.

    `phase` is watching, restoring, or how it ended: finished, stopped, removed, lost. `crashed` is the id of the
    engine's container that crashed last, kept for a look at it. `bundle` is where a bare container's file system
    stays, "" when its checkpoints carry it.
    """

    name: str
    engine: str
    root: str | None
    to: str
    every: float
    keep: int
    phase: str = "watching"
    pid: int = 0
    started: int = 0
    taken: int = 0
    failed: int = 0
    message: str = ""
    crashed: str = ""
    bundle: str = ""
    kept: list[Kept] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Does the guard run?"""
        return self.pid > 0 and start_time(self.pid) == self.started

    @property
    def lost(self) -> float:
        """Seconds of work lost in all crashes that are remembered."""
        return sum(recovery.lost for recovery in self.recoveries)

    def save(self) -> None:
        """Write it. Raises OSError."""
        del self.recoveries[:-_HISTORY]
        place = directory(self.name)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(place / "state.json", {"version": VERSION, **dataclasses.asdict(self)})


def base() -> Path:
    """Where guards keep their state, and checkpoints `--to disk`."""
    return Path(paths.environment("CRYOCI_LIB", "/var/lib/cryoci")) / "guard"


def memory() -> Path:
    """Where checkpoints `--to tmpfs` are."""
    return Path(paths.run_directory()) / "guard"


def directory(name: str) -> Path:
    """The directory of the guard of container `name`. Raises UsageError for what is no name of a container."""
    if not paths.valid_id(name):
        raise UsageError(f"{name!r} is not a name of a container", hint="see `cryoci guard status`")
    return base() / name


def load(name: str) -> State | None:
    """The state of the guard of container `name`; None when there is none. Raises ConfigError, PermissionError."""
    file = directory(name) / "state.json"
    try:
        return _state(read_json(file))
    except FileNotFoundError:
        return None
    except PermissionError:  # nothing is wrong with it
        raise
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"the state of the guard of {name} cannot be read: {file}: {e}",
            hint="its checkpoints lie beside it: restore one by hand, then remove that directory",
        ) from e


def every_state() -> list[State]:
    """The states of all guards, by name; one that cannot be read is left out."""
    found = []
    for name in sorted(os.listdir(base())) if base().is_dir() else []:
        try:
            state = load(name)
        except (ConfigError, UsageError):
            continue
        if state is not None:
            found.append(state)
    return found


def forget(state: State) -> None:
    """Remove what the guard knows and keeps in directories. Raises NotFoundError when it still runs."""
    for place in (directory(state.name), memory() / state.name):
        shutil.rmtree(place, ignore_errors=True)
    if directory(state.name).exists():
        raise NotFoundError(f"{directory(state.name)} cannot be removed", hint="see who uses it")


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc_pid_stat(5)); 0 when it is gone or dead."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def _state(value: dict[str, Any]) -> State:
    if value.pop("version") != VERSION:
        raise ValueError("it is of another version of cryoci")
    value["kept"] = [Kept(**one) for one in value["kept"]]
    value["recoveries"] = [Recovery(**one) for one in value["recoveries"]]
    return State(**value)
