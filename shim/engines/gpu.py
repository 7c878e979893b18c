# SPDX-License-Identifier: Apache-2.0
"""A container's GPU given free and taken back: `cryoci park` and `unpark`, and what a checkpoint needs of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from cryoci.command import run
from cryoci.errors import (
    CheckpointError,
    ConflictError,
    CryociError,
    HookError,
    RestoreError,
    SpaceError,
    UnsupportedError,
)
from cryoci.shim import app, config, paths
from cryoci.shim.engines import asleep, processes, wake
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.interrupt import deferred
from cryoci.shim.gpu import dump as dumps
from cryoci.shim.gpu import hold as holds
from cryoci.shim.gpu import nvml, preflight, select, tasks
from cryoci.shim.gpu.hold import Hold
from cryoci.shim.memory import repair as memory
from cryoci.shim.memory.supply import Supplier
from cryoci.shim.record import Record


@dataclasses.dataclass
class Parked:
    """What `park` and `unpark` did. `vram` bytes are (or were) in host memory; `seconds` per step."""

    container: str
    state: str
    vram: int
    changed: bool
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


_ANNOTATED = app.Choice()


def hold(
    container: Container, init: int, purpose: Literal["checkpoint", "park"], *, images: Path | None = None
) -> Hold | None:
    """Bring the container's CUDA processes out of their GPUs; None when it has none, or [gpu] engine is not driver.

    `init` is its first process. A frozen container is thawed for that, and frozen again. Raises what gpu.hold.take
    raises.
    """
    settings = config.load().gpu
    if settings.engine != "driver":
        return None
    return holds.take(
        _record(container),
        init,
        purpose,
        lock_seconds=settings.lock_timeout,
        prefault=settings.prefault,
        images=None if images is None else str(images),
        running=lambda: _running(container),
    )


@contextmanager
def _running(container: Container) -> Iterator[None]:
    """A with block in which it is not frozen. Its engine is not told of that."""
    frozen = container.status == "paused"
    if frozen:
        container.call("resume")
    try:
        yield
    finally:
        if frozen:
            container.call("pause")


def park(
    container: Container, hooks: app.Choice = _ANNOTATED, *, lulled: Callable[[], None] = lambda: None
) -> Parked:
    """Bring the GPU memory of a container into host memory, free its GPUs and freeze it. Idempotent.

    Its application prepares itself before that, by `hooks`; `lulled` is called then.
    Raises ConflictError, UnsupportedError, SpaceError, CudaError, HookError; the container runs on then.
    """
    before, after = app.both(container, hooks)
    with _exclusive(container), ExitStack() as undo:
        left = holds.load(_record(container))
        if left is not None and left.parked and container.status == "paused":
            return Parked(container.name, "parked", preflight.vram(left.dump.tasks), False)
        now = container.must_run()
        if now.get("status") == "paused":
            raise ConflictError(
                f"container {container.name} is paused",
                hint="unpause it, then park it: parking pauses it too",
            )
        init = int(now.get("pid", 0))
        _refuse_other_engines(container, init)
        done = Parked(container.name, "parked", 0, True)
        if before.steps:
            at = time.monotonic()
            undo.callback(wake.settle, container, [after], done.warnings)
            wake.prepare(container, before, asleep.Asleep(after, _used(init)), done.warnings)
            done.seconds["pre-checkpoint hooks"] = time.monotonic() - at
        lulled()
        with deferred():
            held = _out(container, init, done.seconds)
            undo.pop_all()
        done.vram = preflight.vram(held.dump.tasks)
        return done


def _out(container: Container, init: int, seconds: dict[str, float]) -> Hold:
    """Off its GPUs, and frozen. Raises as `park`; then it runs on."""
    at = time.monotonic()
    held = hold(container, init, "park") or _empty(container)
    seconds["gpu"] = time.monotonic() - at
    try:
        at = time.monotonic()
        _pause(container, True)
        seconds["freeze"] = time.monotonic() - at
    except CryociError:
        held.release()
        raise
    return held


def _used(init: int) -> dict[str, int]:
    """Bytes that a container holds on each GPU, by UUID."""
    if not tasks.any_cuda(init):
        return {}
    with nvml.opened() as management:
        return tasks.held(init, management.used_by())


def _refuse_other_engines(container: Container, init: int) -> None:
    """What CRIU's plugin does happens within a dump: frozen alone, a container would keep its GPUs."""
    engine = config.load().gpu.engine
    if engine != "driver" and tasks.any_cuda(init):
        raise UnsupportedError(
            f"container {container.name} has CUDA processes, and [gpu] engine is {engine!r}: nobody brings them "
            "out of their GPUs",
            hint=f'set engine = "driver" below [gpu] in {paths.config_file()}; parking needs no CRIU',
        )


def unpark(container: Container, *, hooks: bool = True, others: Callable[[], None] | None = None) -> Parked:
    """Bring a parked container back to its GPUs, and let it run. Idempotent.

    An application that prepared itself before it was parked then does what it does after a restore, unless `hooks`
    is False. `others` returns when those who are about to give room for that have done so; it is called in between.
    Raises SpaceError while its GPUs have too little free memory (it stays parked then), CudaError, RestoreError, and
    HookError, after which the container runs, and another unpark does the hooks again.
    """
    with _exclusive(container):
        held = holds.load(_record(container))
        owed = asleep.load(container) if hooks else None
        if held is None:
            status = container.status
            if status != "running":
                raise ConflictError(f"container {container.name} is {status}, and was not parked by cryoci")
            done = Parked(container.name, status, 0, False)
            done.changed = _wake(container, done, owed)
            return done
        if held.purpose != "park":
            raise ConflictError(
                f"container {container.name} is in the middle of a {held.purpose}",
                hint="wait for it to end; if its cryoci was killed: `cryoci repair CONTAINER`",
            )
        awake = owed.vram if owed is not None else {}
        check_room(held.dump, {} if others is not None else awake)
        done = Parked(container.name, "running", preflight.vram(held.dump.tasks), True)
        with deferred():
            at = time.monotonic()
            if container.status == "paused":
                _pause(container, False)
            done.seconds["thaw"] = time.monotonic() - at
            at = time.monotonic()
            try:
                held.release()
            except CryociError:
                _pause(container, True)
                raise
            done.seconds["gpu"] = time.monotonic() - at
        if container.status != "running":
            raise RestoreError(f"container {container.name} is {container.status} after it was unparked")
        if others is not None and owed is not None:
            others()
            _still_room(container, held.dump, awake)
        _wake(container, done, owed)
        return done


def unpark_or_stay(
    container: Container, *, hooks: bool = True, others: Callable[[], None] | None = None
) -> Parked:
    """`unpark`, but one whose application does not come to itself is parked again. Raises what `unpark` raises."""
    try:
        return unpark(container, hooks=hooks, others=others)
    except HookError:
        with suppress(CryociError):  # then it runs, half asleep, as the first error says
            park(container, app.Choice(off=True))
        raise


def _still_room(container: Container, dump: dumps.Dump, awake: Mapping[str, int]) -> None:
    """Raise SpaceError, with the container parked again, unless it can take what it takes when it is awake."""
    init = int(container.state().get("pid", 0))
    now = _used(init)
    more = {uuid: max(0, size - now.get(uuid, 0)) for uuid, size in awake.items()}
    try:
        check_room(dataclasses.replace(dump, tasks=[]), more)
    except SpaceError:
        with deferred():
            _out(container, init, {})
        raise


def _wake(container: Container, done: Parked, owed: asleep.Asleep | None) -> bool:
    """Do what is owed to its application; returns whether anything was. Raises HookError."""
    at = time.monotonic()
    try:
        said = asleep.wake(container, owed)
    except HookError as e:
        raise HookError(
            f"container {container.name} runs, and is not itself yet: {e.message}",
            hint=f"`cryoci unpark {container.name}` tries that again",
        ) from e
    if owed is None:
        return False
    done.warnings += said
    done.seconds["post-restore hooks"] = time.monotonic() - at
    return True


def is_parked(container: Container) -> bool:
    """Does the journal say so? Asks no engine and no runtime. Raises ConflictError when it is broken."""
    left = holds.load(_record(container))
    return left is not None and left.parked


def repair(container: Container, supplier: Supplier | None = None) -> str:
    """Bring back what a killed cryoci has left of a container; returns what was done, in words.

    `supplier` leads to memory that was stored elsewhere. Raises ConflictError while an operation is under way,
    CudaError and RestoreError when it cannot be done.
    """
    with _exclusive(container) as directory:
        moved = memory.repair(_record(container), supplier)  # first: CUDA restores into memory that is there
        done = [moved] if moved else []
        left = holds.load(_record(container))
        frozen_by_us = directory / processes.HELD
        if left is not None and left.parked and container.status == "paused":
            return "it is parked, as it was asked for"
        with deferred():
            if container.status == "paused" and (left is not None or frozen_by_us.exists()):
                _pause(container, False)
                done.append("thawed")
            frozen_by_us.unlink(missing_ok=True)
            held = left if left is not None else _stray(container)
            if held is not None and held.dump.tasks:
                held.release()
                done.append(f"{len(held.dump.tasks)} CUDA processes back on their GPUs")
            elif held is not None:
                held.forget()
        status = container.status
        if status not in ("running", "paused"):
            raise CheckpointError(
                f"container {container.name} is {status}", hint="start it, or restore a checkpoint of it"
            )
        if status == "running":
            owed = asleep.load(container)
            said = asleep.wake(container, owed)
            if owed is not None:
                done.append(", ".join(["post-restore hooks done", *said]))
    return ", ".join(done) or "nothing was left to repair"


def _stray(container: Container) -> Hold | None:
    """CUDA processes that are locked or checkpointed without a journal, as another tool leaves them."""
    from cryoci.shim.gpu.cuda import Driver, State

    init = int(container.state().get("pid", 0))
    if not tasks.any_cuda(init):
        return None
    driver = Driver()
    with _running(container):  # its user may have paused it
        found = [task for task in tasks.cuda(driver, init) if driver.state(task.pid) is not State.RUNNING]
    if not found:
        return None
    held = Hold(_record(container), "checkpoint", dumps.Dump("", 0, tasks=found), {}, ours=True)
    held.running = lambda: _running(container)
    return held


def _empty(container: Container) -> Hold:
    """The journal of a parked container that has no CUDA."""
    held = Hold(_record(container), "park", dumps.Dump("", 0), {}, ours=True)
    held.write(done=True)
    return held


def check_room(dump: dumps.Dump, awake: Mapping[str, int]) -> None:
    """Raise SpaceError unless each GPU has room: a restore that runs out of memory is lost for good.

    `awake`: bytes by UUID that the container takes again as soon as it runs.
    """
    if not (dump.tasks or awake):
        return
    with nvml.opened() as management:
        here = {gpu.uuid: gpu for gpu in management.gpus()}
        wanted = [
            dataclasses.replace(one, need=max(one.need, awake.get(one.uuid, 0))) for one in dump.wanted
        ]
        wanted = [one for one in wanted if one.need]
        select.choose(wanted, list(here.values()), {one.uuid: one.uuid for one in wanted})


def _pause(container: Container, wanted: bool) -> None:
    """Freeze or thaw by the engine, so that it knows. Raises ToolError."""
    if container.engine == "podman":
        run(["podman", "pause" if wanted else "unpause", "--", container.id])
    else:
        container.call("pause" if wanted else "resume")


def _exclusive(container: Container) -> AbstractContextManager[Path]:
    return processes.exclusive(
        Path(_record(container).directory), f"operation on container {container.name}"
    )


def _record(container: Container) -> Record:
    return Record(container.root, container.id)
