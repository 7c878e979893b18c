# SPDX-License-Identifier: Apache-2.0
"""What happens around a restore: CRIU restores the processes stopped, and they get their memory before they run."""

from __future__ import annotations

import os

from cryoci.errors import ImageError, RestoreError
from cryoci.shim import cgroup
from cryoci.shim.memory import chain, find, freezer, guard, index, journal, repair
from cryoci.shim.memory.freezer import Freezer
from cryoci.shim.memory.journal import Journal, Member
from cryoci.shim.memory.settings import Settings
from cryoci.shim.record import Record


def prepare(record: Record, directory: str) -> str:
    """Check the index and make a view of the images that CRIU accepts; returns its path.

    Raises ImageError, UnsupportedError, OSError.
    """
    chain.Places(index.read(directory), directory).close()
    if not guard.armed(directory):
        raise ImageError(
            "the checkpoint was cut off before it was complete: its threads are not where they were",
            hint="`cryoci repair CONTAINER` completes it while its node has not been restarted; else use another one",
        )
    where = record.directory + "/images"
    guard.view(directory, where)
    return where


def complete(record: Record, init: int, directory: str, settings: Settings) -> None:
    """Fill the restored container whose first process is `init`, and let it run.

    Raises RestoreError, ImageError, IntegrityError: the processes are stopped then, and must be ended.
    """
    wanted = set(index.read(directory).areas)
    level = find.depth(init)
    members = []
    for pid in cgroup.tree(init):
        numbers = find.status(pid).get("NSpid", "").split()
        if len(numbers) >= level and int(numbers[level - 1]) in wanted:
            members.append(Member(pid, int(numbers[level - 1]), find.born(pid)))
    box = Freezer.of(init)
    note = Journal("restoring", os.path.abspath(directory), box.path, box.frozen, tuple(members))
    note.write(record)
    missing = wanted - {member.vpid for member in members}
    if missing:
        raise RestoreError(
            f"processes {sorted(missing)} of the container, whose memory is to be filled, are not there"
        )
    freezer.await_stopped(member.pid for member in members)
    repair.bring_back(record, note, settings)


def cancel(record: Record) -> None:
    """Forget a restore that failed, whose processes have been ended. Never raises."""
    journal.remove(record)
    guard.remove_view(record.directory + "/images")
