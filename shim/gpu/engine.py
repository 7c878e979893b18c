# SPDX-License-Identifier: Apache-2.0
"""CUDA processes out of their GPUs and back in, all of a container together.

All are locked before any is checkpointed: coupled processes that are locked one by one wait for each other for
ever. Every step is verified by asking for the state, since the driver's return code alone has been wrong. An
error undoes in reverse what was done, and leaves each process in the state in which it was found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cryoci import trace
from cryoci.errors import CheckpointError, ConflictError, CryociError, RestoreError, UnsupportedError
from cryoci.shim.gpu.cuda import Code, CudaError, Driver, State
from cryoci.shim.gpu.prefault import THREADS, ahead
from cryoci.shim.gpu.tasks import Task, environment

JOBS = 16
_SETTLE = 5  # rounds in which processes that became CUDA ones meanwhile are locked too


def suspend(
    driver: Driver,
    find: Callable[[], list[Task]],
    *,
    lock_ms: int,
    note: Callable[[list[Task]], None] = lambda tasks: None,
    prefault: bool = True,
) -> list[Task]:
    """Lock and checkpoint the CUDA processes that `find` returns; returns them all.

    `note` is told of them before anything is done to one. Processes that are found checkpointed stay so.
    `prefault`: see shim/gpu/prefault.py.
    Raises CudaError and others; each process is then as it was, or CheckpointError says which is not.
    """
    known: dict[int, Task] = {}
    touched: list[Task] = []  # also where the driver says that it failed: it may have done it all the same
    try:
        for _ in range(_SETTLE):
            fresh = [task for task in find() if task.pid not in known]
            if not fresh:
                break
            note([*known.values(), *fresh])
            known.update({task.pid: task for task in fresh})
            running = [task for task in fresh if _found(driver, task) is State.RUNNING]
            touched += running
            _all(running, lambda task: _lock(driver, task, lock_ms))
        else:
            raise ConflictError(
                "new CUDA processes keep appearing in the container",
                hint="try again when it has started up",
            )
        threads = 0
        if prefault and touched:
            threads = min(THREADS, os.cpu_count() or 1) // (1 if sequential(touched) else len(touched))
        _all(touched, lambda task: _checkpoint(driver, task, threads))
    except BaseException as e:
        _undo(driver, touched, e)
        raise
    return list(known.values())


def resume(driver: Driver, tasks: Sequence[Task], pairs: Mapping[bytes, bytes] | None = None) -> None:
    """Bring checkpointed or locked processes back to running. Idempotent. Raises CudaError, RestoreError.

    All are restored before any is unlocked. `pairs` maps old to new GPUs by UUID.
    """
    alive = [task for task in tasks if task.alive]
    _all(alive, lambda task: _restore(driver, task, pairs))
    _all(alive, lambda task: _unlock(driver, task))
    for task in alive:
        state = driver.state(task.pid)
        if state is not State.RUNNING:
            raise RestoreError(
                f"process {task.pid} ({task.comm}) is {state} for the CUDA driver after its restore",
                hint="its GPU is lost to it; end the container and restore an earlier checkpoint",
            )


def fence(driver: Driver, tasks: Sequence[Task], *, lock_ms: int) -> None:
    """Wait until calls of a caller that was killed have ended: the driver goes on with them. `resume` follows.

    A lock goes behind them; that it fails, in any state but running, is as good.
    """

    def lock(task: Task) -> None:
        try:
            driver.lock(task.pid, lock_ms)
        except CudaError:
            pass

    _all([task for task in tasks if task.alive], lock)


def sequential(tasks: Sequence[Task]) -> bool:
    """Are they members of one CUDA checkpoint job (r590), which the driver takes one after the other?"""
    return any("CUDA_CHECKPOINT_JOB_FILE" in environment(task.pid) for task in tasks)


def _found(driver: Driver, task: Task) -> State:
    state = driver.state(task.pid)
    if state is State.FAILED:
        raise UnsupportedError(
            f"process {task.pid} ({task.comm}) is failed for the CUDA driver, which has no way back",
            hint="end the container and restore an earlier checkpoint",
        )
    if state not in (State.RUNNING, State.CHECKPOINTED):
        raise ConflictError(
            f"process {task.pid} ({task.comm}) is {state} for the CUDA driver: something else operates on it",
            hint="wait for it to end; `cryoci repair CONTAINER` brings back what a killed tool has left",
        )
    return state


def _lock(driver: Driver, task: Task, timeout_ms: int) -> None:
    driver.lock(task.pid, timeout_ms)
    _expect(driver, task, State.LOCKED, "lock")


def _checkpoint(driver: Driver, task: Task, threads: int) -> None:
    size = sum(task.vram.values())
    with trace.span(f"driver: checkpoint of {task.pid}", bytes=size), ahead(task.pid, size, threads):
        driver.checkpoint(task.pid)
    _expect(driver, task, State.CHECKPOINTED, "checkpoint")


def _restore(driver: Driver, task: Task, pairs: Mapping[bytes, bytes] | None) -> None:
    if driver.state(task.pid) is not State.CHECKPOINTED:
        return
    try:
        with trace.span(f"driver: restore of {task.pid}", bytes=sum(task.vram.values())):
            driver.restore(task.pid, pairs)
    except CudaError as e:
        # the call of a caller that was killed may have been still under way, and has done it
        if e.code != Code.ILLEGAL_STATE or driver.state(task.pid) is State.CHECKPOINTED:
            raise
    _expect(driver, task, State.LOCKED, "restore")


def _unlock(driver: Driver, task: Task) -> None:
    if driver.state(task.pid) is not State.LOCKED:
        return
    try:
        driver.unlock(task.pid)
    except CudaError:
        if driver.state(task.pid) is not State.RUNNING:  # seen: an error, and it runs all the same
            raise


def _expect(driver: Driver, task: Task, wanted: State, verb: str) -> None:
    state = driver.state(task.pid)
    if state is not wanted:
        raise CheckpointError(
            f"process {task.pid} ({task.comm}) is {state} after the CUDA driver reported success of {verb}",
            hint="this is an error of the driver; see `dmesg` for its Xid messages",
        )


def _all(tasks: Sequence[Task], act: Callable[[Task], None]) -> None:
    """Do `act` on all at the same time and wait for all.

    Raises the first error, but for that of a process that ended meanwhile.
    """
    errors: list[CryociError] = []

    def one(task: Task) -> None:
        try:
            act(task)
        except CudaError as e:
            if task.alive or e.code not in (Code.INVALID_VALUE, Code.NOT_INITIALIZED):
                errors.append(e)
        except CryociError as e:
            errors.append(e)

    if len(tasks) <= 1 or sequential(tasks):
        for task in tasks:
            one(task)
    else:
        with ThreadPoolExecutor(min(JOBS, len(tasks))) as pool:
            list(pool.map(one, tasks))
    if errors:
        raise errors[0]


def _undo(driver: Driver, touched: list[Task], error: BaseException) -> None:
    """Restore what is checkpointed, unlock what is locked; what fails here is added to the first reason."""
    try:
        resume(driver, touched)
    except CryociError as e:
        raise CheckpointError(
            f"{getattr(error, 'message', error)}; and then: {e.message}",
            hint="bring it back by `cryoci repair CONTAINER`",
        ) from error
