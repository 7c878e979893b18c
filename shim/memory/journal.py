# SPDX-License-Identifier: Apache-2.0
"""Who holds the only copy of a container's dropped memory: memory.json in its record.

    captured   the processes hold all of it; they are about to be stopped
    dropping   the chunk files hold all of it, and are durable; the processes are stopped and hold some or none. With
               a `source` they are there: stored and acknowledged (supply.py)
    restoring  the chunk files (the checkpoint) hold all of it; the processes are restored, stopped, and being filled
    filled     the processes hold all of it again, and may run

Each state is on disk before what it announces is done, so whoever finds a journal can finish (`repair`).
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from cryoci.errors import ConflictError
from cryoci.files import read_json, write_json
from cryoci.shim.memory import find
from cryoci.shim.record import Record

NAME = "memory.json"
VERSION, SUPPLIED = 1, 2  # 2: the chunks are where `source` says, which an older cryoci would not look at
State = Literal["captured", "dropping", "restoring", "filled"]
_STATES = ("captured", "dropping", "restoring", "filled")


@dataclass(frozen=True)
class Member:
    """A process whose memory moves: `pid` here, `vpid` in the container, start time `born`; what the drop saved."""

    pid: int
    vpid: int
    born: int
    saved: dict[str, str] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether it is still there, and no other under its pid."""
        return find.alive(self.pid, self.born)


@dataclass(frozen=True)
class Journal:
    """One operation: `directory` has the chunks, unless they are in `source`; `freezer` is a cgroup, and `frozen` what
    it was before; `owner` is the process at work on it, with its start time."""

    state: State
    directory: str
    freezer: str
    frozen: bool
    members: tuple[Member, ...]
    owner: tuple[int, int] = dataclasses.field(default_factory=lambda: (os.getpid(), find.born(os.getpid())))
    source: str = ""

    @property
    def busy(self) -> bool:
        """Whether another process is at work on it."""
        return self.owner[0] != os.getpid() and find.alive(*self.owner)

    def write(self, record: Record) -> None:
        """Write it, durably. Raises OSError."""
        record.make()
        value = dataclasses.asdict(self)
        if not self.source:
            del value["source"]
        write_json(_path(record), {"version": SUPPLIED if self.source else VERSION, **value})

    def become(self, record: Record, state: State) -> Journal:
        """Write the same in another state. Raises OSError."""
        changed = dataclasses.replace(self, state=state)
        changed.write(record)
        return changed

    def at(self, record: Record, directory: str) -> Journal:
        """Write that the chunks are in `directory` now. Raises OSError."""
        changed = dataclasses.replace(self, directory=directory)
        changed.write(record)
        return changed

    def with_saved(self, record: Record, pid: int, saved: dict[str, str]) -> Journal:
        """Write what the drop has saved of a process. Raises OSError."""
        members = tuple(dataclasses.replace(m, saved=saved) if m.pid == pid else m for m in self.members)
        changed = dataclasses.replace(self, members=members)
        changed.write(record)
        return changed


def read(record: Record) -> Journal | None:
    """The journal of a container, None when there is none. Raises ConflictError when it cannot be read."""
    try:
        value = read_json(_path(record))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ConflictError(
            f"{_path(record)} cannot be read: {e}", hint="it is of another cryoci, or damaged"
        ) from e
    try:
        if value["version"] not in (VERSION, SUPPLIED) or value["state"] not in _STATES:
            raise ValueError("another version")
        members = tuple(Member(m["pid"], m["vpid"], m["born"], m["saved"]) for m in value["members"])
        pid, since = value["owner"]
        return Journal(
            value["state"],
            value["directory"],
            value["freezer"],
            value["frozen"],
            members,
            (int(pid), int(since)),
            str(value["source"]) if value["version"] == SUPPLIED else "",
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ConflictError(
            f"{_path(record)} is no journal of this cryoci: {e}", hint="use the cryoci that wrote it"
        ) from e


def remove(record: Record) -> None:
    """Forget it. Never raises."""
    with suppress(OSError):
        os.unlink(_path(record))


def _path(record: Record) -> str:
    return f"{record.directory}/{NAME}"
