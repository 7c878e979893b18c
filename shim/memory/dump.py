# SPDX-License-Identifier: Apache-2.0
"""What happens around a dump: memory out before it, and back after it when the container lives on."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from cryoci import trace
from cryoci.errors import CheckpointError, ConflictError, CryociError, SpaceError, UnsupportedError
from cryoci.files import keep
from cryoci.shim import cgroup
from cryoci.shim.memory import capture, find, freezer, inject, journal, placement, repair, stand
from cryoci.shim.memory.find import Process
from cryoci.shim.memory.freezer import Freezer
from cryoci.shim.memory.journal import Journal, Member
from cryoci.shim.memory.meter import Meter
from cryoci.shim.memory.parent import Parent
from cryoci.shim.memory.settings import Settings
from cryoci.shim.memory.sink import Sink, arrange
from cryoci.shim.record import Record


def take_out(
    record: Record,
    init: int,
    directory: str,
    settings: Settings,
    parent: Parent | None = None,
    returns: bool = False,
    sink: Sink | None = None,
) -> Journal | None:
    """Capture and drop the large memory of the container whose first process is `init`.

    Chunks that are as in `parent` are linked instead of written. `returns`: it will be put back from there soon. With
    `sink` chunks are stored there; when this or the dump fails after the drop, whoever has the sink puts them back.

    Returns the journal to hand to `put_back` or `conclude`; None when there is nothing to move. When it raises,
    the container is as it was. Raises CheckpointError, UnsupportedError, ConflictError, SpaceError.
    """
    if not inject.supported():
        raise UnsupportedError(
            f"memory cannot be moved out of band on {os.uname().machine} yet",
            hint='set [memory] engine = "criu"',
        )
    if journal.read(record) is not None:
        raise ConflictError(
            f"an earlier operation on container {record.id} was cut off while its memory was away",
            hint=f"finish it first: cryoci repair {record.id}",
        )
    cgroup.gather(init)
    box = Freezer.of(init)
    was_frozen = box.frozen
    try:
        box.set(True)
        everybody = cgroup.tree(init)
        with trace.span("memory: find"):
            chosen = find.processes(init, settings.threshold)
        if not chosen:
            box.set(was_frozen)
            return None
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # with a parent nobody knows before; nothing is dropped if there is too little
        if parent is None and sink is None:
            _check_space(chosen, directory)
        with trace.span("memory: place"):
            if sink is not None:
                chosen, plan = arrange(chosen, settings)
            else:
                plan = placement.for_capture(directory, _size(chosen), settings, returns=returns)
            plan.keep(record, "capture")
        size = _size(chosen)
        with (
            trace.span("memory: capture", bytes=size, chosen=plan.text),
            Meter(record.directory, "capture", size) as meter,
        ):
            capture.capture(chosen, directory, plan.settings, parent, meter.add, sink)
            source = sink.seal(directory) if sink is not None else ""
        members = tuple(Member(p.pid, p.vpid, p.born) for p in chosen)
        note = Journal("captured", os.path.abspath(directory), box.path, was_frozen, members, source=source)
        note.write(record)
        keep(directory, True)
        moved = {process.pid for process in chosen}
        with trace.span("memory: drop", bytes=size):
            others = [pid for pid in everybody if pid not in moved]
            return _drop(record, note, box, chosen, others, settings.workers, find.depth(init))
    except BaseException as e:
        _undo(record, journal.read(record), box, was_frozen, directory, settings, e)
        if isinstance(e, OSError):
            kind = SpaceError if e.errno in (28, 122) else CheckpointError
            raise kind(f"memory of container {record.id} could not be moved: {e}") from e
        raise


def put_back(record: Record, note: Journal, settings: Settings) -> None:
    """The container lives on: give it its memory. Raises RestoreError, ImageError...; it stays stopped then."""
    repair.bring_back(record, note, settings)


def conclude(record: Record, note: Journal) -> None:
    """The dump is complete: make its images good, and see that they are not restored bare.

    Raises OSError, ImageError, RestoreError.
    """
    repair.complete(record, note.directory)


def _drop(
    record: Record,
    note: Journal,
    box: Freezer,
    chosen: Sequence[Process],
    others: Sequence[int],
    threads: int,
    level: int,
) -> Journal:
    """Stop the chosen by signal, and have them drop, so many at once; nobody runs an instruction of his own meanwhile.

    The signal waits while they are frozen, and is the first that they see when thawed: it stops them on their way
    out of the kernel. If the container was frozen before, the others are held by ptrace for that time.
    """
    pids = [process.pid for process in chosen]
    held = inject.Hold(others if note.frozen else ())
    lock = threading.Lock()

    def drop(process: Process) -> None:  # all of it in one thread: only that may trace the process
        def save(saved: dict[str, str]) -> None:
            nonlocal note
            with lock:
                note = note.with_saved(record, process.pid, saved)

        inject.drop(process.pid, process.areas, save)

    try:
        freezer.stop(pids)
        box.set(False)
        freezer.await_stopped(pids)
        note = note.become(record, "dropping")
        capture.each(drop, chosen, min(threads, len(chosen)))
        stand.note(record, pids, level)
        if note.frozen:
            box.set(True)
    finally:
        held.release()
    # registers are back in their places: a later repair must not put older ones there
    for process in chosen:
        note = note.with_saved(record, process.pid, {})
    return note


def _undo(
    record: Record,
    note: Journal | None,
    box: Freezer,
    was_frozen: bool,
    directory: str,
    settings: Settings,
    error: BaseException,
) -> None:
    if note is None:
        box.set(was_frozen)
        capture.remove(directory)
        return
    if note.source and note.state != "captured":
        return  # whoever has the sink puts it back
    try:
        repair.bring_back(record, note, settings)
    except (CryociError, OSError) as e:
        raise CheckpointError(
            f"{error}; and the memory of container {record.id} could not be put back: {e}",
            hint=f"its processes are stopped, its memory is in {directory}: cryoci repair {record.id}",
        ) from error
    capture.remove(directory)


def _size(chosen: Sequence[Process]) -> int:
    return sum(area.resident for process in chosen for area in process.areas)


def _check_space(chosen: Sequence[Process], directory: str) -> None:
    need = _size(chosen)
    info = os.statvfs(directory)
    free = info.f_bavail * info.f_frsize
    if need > free:
        raise SpaceError(
            f"{directory} has {free >> 20} MiB free, and the container's memory needs {need >> 20} MiB",
            hint="free space there, or give another directory",
        )
    spare = placement.available_memory()
    if need > spare and placement.in_memory(directory):
        raise SpaceError(
            f"{directory} is memory, of which this node has {spare >> 20} MiB left, and the container's needs "
            f"{need >> 20} MiB",
            hint="give a directory on a disk",
        )
