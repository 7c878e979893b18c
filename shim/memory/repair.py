# SPDX-License-Identifier: Apache-2.0
"""Finish what a journal tells of: the container gets its memory back and runs on, or its images are made whole.

The same steps serve the ordinary end of a checkpoint that leaves its container alive.
"""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import suppress

from cryoci import trace
from cryoci.errors import ConflictError, CryociError, RestoreError
from cryoci.files import keep
from cryoci.shim.memory import (
    capture,
    fill,
    find,
    freezer,
    guard,
    index,
    inject,
    journal,
    placement,
    sink,
    stand,
    supply,
)
from cryoci.shim.memory.journal import Journal, Member
from cryoci.shim.memory.meter import Meter
from cryoci.shim.memory.settings import Settings
from cryoci.shim.memory.supply import Supplier, Supply
from cryoci.shim.record import Record

_SETTLE = 5.0  # seconds


def repair(record: Record, supplier: Supplier | None = None) -> str | None:
    """Finish the operation in the journal of a container; returns what was done, None without a journal.

    `supplier` leads to memory that lies in no directory. May be called again and again. Raises ConflictError when the
    operation is under way or the journal cannot be trusted, and RestoreError, ImageError, IntegrityError when the
    memory cannot be brought back: the processes stay stopped then, and the journal stays.
    """
    found = journal.read(record)
    if found is None:
        return None
    if found.busy:
        raise ConflictError(
            f"process {found.owner[0]} is moving memory of container {record.id}", hint="wait for it to end"
        )
    if not any(member.alive for member in found.members):
        where = _conclude(record, found, supplier)
        return f"its processes are gone; {where} holds its memory"
    bring_back(record, found, Settings(), supplier)
    if not os.path.exists(f"{found.directory}/{guard.INVENTORY}"):
        capture.remove(found.directory)  # the dump never was
    return f"{len(found.members)} processes have their memory and run on"


def complete(record: Record, directory: str) -> None:
    """CRIU's images in `directory` have come to their end: threads where they stood, then the guard, which says so.

    May be called again. Raises OSError, ImageError, RestoreError.
    """
    stand.correct(record, directory)
    guard.arm(directory)


def abandon(record: Record) -> None:
    """The container has been ended, and its checkpoint is stored: forget a journal that there may be."""
    found = journal.read(record)
    if found is not None:
        forget(record, found)


def bring_back(record: Record, found: Journal, settings: Settings, supplier: Supplier | None = None) -> None:
    """Fill the processes if some of their memory is away, and let them go on. Raises as `repair` does."""
    source = None
    if found.state in ("dropping", "restoring"):
        if found.source:
            source = supply.supplied(found.source, supplier, record.id)
        _fill(record, found, settings, source)
        found = found.become(record, "filled")
    release(record, found)
    if found.source and source is None and supplier is not None:
        with suppress(CryociError):
            source = supplier(found.source)
    if source is not None and not source.stays:
        source.forget()


def release(record: Record, found: Journal) -> None:
    """Let the processes go on, as frozen or not as they were, and forget the journal."""
    alive = [member.pid for member in found.members if member.alive]
    freezer.proceed(alive)
    with suppress(OSError):  # its cgroup is gone with its last process
        freezer.Freezer(found.freezer).set(found.frozen)
    forget(record, found)


def forget(record: Record, found: Journal) -> None:
    """Remove the journal; its directory is as any other again. Never raises."""
    stand.forget(record)
    journal.remove(record)
    with suppress(OSError):
        keep(found.directory, False)


def _quiet(pid: int) -> bool:
    return freezer.stopped(pid) and find.status(pid).get("TracerPid") == "0"


def _fill(record: Record, found: Journal, settings: Settings, source: Supply | None) -> None:
    alive = [member for member in found.members if member.alive]
    deadline = time.monotonic() + _SETTLE
    for member in alive:
        # threads that a killed CRIU held are on their way back into their stop
        while not _quiet(member.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not freezer.stopped(member.pid):
            raise ConflictError(
                f"process {member.pid} was continued by somebody while its memory was away",
                hint=f"kill it, and restore it from {found.directory}",
            )
        tracer = find.status(member.pid).get("TracerPid")
        if tracer != "0":
            raise ConflictError(
                f"process {member.pid} is held by process {tracer}, maybe a CRIU at work",
                hint="wait for it to end, then repair again",
            )
        _heal(record, member, found)
    pids = {member.vpid: member.pid for member in alive}
    if source is None:
        content = index.read(found.directory)
    else:
        with supply.reaching(found.source, record.id):
            content = supply.read_index(source)
    mine = index.Index(
        {vpid: runs for vpid, runs in content.areas.items() if vpid in pids},
        tuple(entry for entry in content.chunks if entry[0].vpid in pids),
        content.sources,
    )
    size = fill.size(mine, found.directory) if source is None else source.size
    if source is not None:  # each of them holds a chunk
        most = max(source.budget or sink.BUDGET, source.largest) // max(source.largest, 1)
        settings = dataclasses.replace(settings, threads=max(1, min(settings.workers, most)))
    plan = placement.for_fill(size, settings)
    plan.keep(record, "fill")
    with (
        trace.span("memory: fill", bytes=size, chosen=plan.text),
        Meter(record.directory, "fill", size) as meter,
    ):
        fill.fill(mine, found.directory, pids, plan.settings.workers, meter.add, source)


def _heal(record: Record, member: Member, found: Journal) -> None:
    """Its threads stand where a drop or a CRIU that was killed has left them: put them back."""
    box = freezer.Freezer(found.freezer)
    was = bool(member.saved) and box.frozen
    try:
        if was:
            box.set(False)
        if member.saved:
            inject.heal(member.pid, member.saved)
        stand.put_back(record, member.pid)
    except (OSError, CryociError) as e:
        raise RestoreError(f"process {member.pid} cannot be put back to where it was: {e}") from e
    finally:
        if was:
            box.set(True)


def _conclude(record: Record, found: Journal, supplier: Supplier | None) -> str:
    """The processes are gone: what CRIU has dumped of them, if it has, must not be restored bare.

    Memory that lies elsewhere is brought to their images, unless it is on its way into an image. Returns where it is.
    """
    dumped = os.path.exists(f"{found.directory}/{guard.INVENTORY}") and index.exists(found.directory)
    source = None
    if found.source and supplier is not None:
        source = supply.supplied(found.source, supplier, record.id)
    if dumped:
        if source is not None and not source.stays:
            supply.bring(source, found.directory)
        complete(record, found.directory)
        # not `forget`: a scratch directory of a killed cryoci, which holds them now, stays until the next boot
        stand.forget(record)
        journal.remove(record)
    else:
        forget(record, found)
    if source is not None and not source.stays:
        source.forget()
    return found.source if source is None and found.source else found.directory
