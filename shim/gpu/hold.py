# SPDX-License-Identifier: Apache-2.0
"""A container's CUDA processes, held out of their GPUs; and the journal that says so.

The journal (`gpu.json` in the container's record) is written before the driver is asked for anything and removed
when the processes run again or are gone. The driver itself knows the state of each process, so the journal only
says what was meant: whoever finds one whose owner is dead brings the processes back (`repair`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

from cryoci.errors import ConflictError, ImageError
from cryoci.files import read_json, write_json
from cryoci.shim.gpu import dump as dumps
from cryoci.shim.gpu import engine, helper, moved, nvml, preflight, tasks
from cryoci.shim.gpu.cuda import Driver
from cryoci.shim.gpu.dump import Dump
from cryoci.shim.record import Record

NAME = "gpu.json"
_FENCE_MS = 60_000
Running = Callable[[], AbstractContextManager[None]]
Purpose = Literal["checkpoint", "park", "restore"]


@contextmanager
def nothing() -> Iterator[None]:
    """A with block that does nothing."""
    yield


class Hold:
    """Processes that are held. `ours` says whether this caller is to bring them back."""

    def __init__(
        self, record: Record, purpose: str, dump: Dump, pairs: dict[str, str], *, ours: bool
    ) -> None:
        self.path = f"{record.directory}/{NAME}"
        self.purpose = purpose
        self.dump = dump
        self.pairs = pairs
        self.ours = ours
        self.running: Running = nothing
        self.interrupted = False  # its maker died before it was done
        self.owned = False  # its maker lives

    @property
    def parked(self) -> bool:
        """Was it taken to stay, and done?"""
        return self.purpose == "park" and not self.interrupted

    def write(self, *, done: bool) -> None:
        """Write the journal. Raises OSError."""
        me = tasks.look(os.getpid())
        write_json(
            self.path,
            {
                "version": 1,
                "purpose": self.purpose,
                "done": done,
                "owner": {"pid": me.pid, "start": me.start},
                "pairs": self.pairs,
                "dump": self.dump.to_json(),
            },
        )

    def release(self) -> None:
        """Bring the processes back to their GPUs, if this caller is to. Raises CudaError, RestoreError."""
        if not self.ours:
            return
        from cryoci.shim.engines.interrupt import deferred

        with deferred():
            if any(task.alive for task in self.dump.tasks):
                pairs = {nvml.uuid_bytes(a): nvml.uuid_bytes(b) for a, b in self.pairs.items()}
                with nvml.opened() as management:
                    persistent = all(gpu.persistence for gpu in management.gpus())
                driver = helper.open_driver(persistent=persistent)
                with self.running():
                    if self.interrupted:
                        engine.fence(driver, self.dump.tasks, lock_ms=_FENCE_MS)
                    with moved.told(os.path.dirname(self.path), "gpu-in", self.dump.tasks):
                        engine.resume(driver, self.dump.tasks, pairs or None)
            self.forget()

    def end(self) -> None:
        """The container was ended: remove the journal, a parked container's too."""
        self.ours = True
        self.forget()

    def forget(self) -> None:
        """Remove the journal: the processes are gone, or run."""
        if self.ours:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass


def load(record: Record) -> Hold | None:
    """What the journal holds; None without a journal.

    Raises ConflictError when it cannot be understood.
    """
    try:
        value = read_json(f"{record.directory}/{NAME}")
        dump = Dump.from_json(value["dump"])
        owner = tasks.Task(int(value["owner"]["pid"]), int(value["owner"]["start"]), 0, "")
        pairs = {str(a): str(b) for a, b in value["pairs"].items()}
        hold = Hold(record, str(value["purpose"]), dump, pairs, ours=True)
        hold.interrupted = not value["done"]
        hold.owned = owner.alive
        return hold
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImageError) as e:
        raise ConflictError(
            f"the journal {record.directory}/{NAME} is broken: {e}",
            hint="see `cryoci ps`; remove it when the container's processes run",
        ) from e


def take(
    record: Record,
    init: int,
    purpose: Purpose,
    *,
    lock_seconds: float,
    prefault: bool = True,
    images: str | None = None,
    running: Running = nothing,
) -> Hold | None:
    """Bring the CUDA processes of the container out of their GPUs; None when it has none.

    `running` gives a with block in which the container is not frozen, here and at its release. `images` is the
    directory that their memory goes to next; `prefault` as engine.suspend has it. What a parked container or a
    living caller holds already is returned as not ours; what a dead one left is brought back first. Raises what
    `preflight` and the driver raise; nothing is held then.
    """
    left = load(record)
    if left is not None:
        if left.parked or (left.owned and left.purpose != "restore"):
            left.ours = False
            return left
        left.running = running
        left.release()
    if not tasks.any_cuda(init):
        return None
    from cryoci.shim.engines.interrupt import deferred

    with nvml.opened() as management:
        gpus = preflight.seen(management, init)
        driver = helper.open_driver(persistent=all(gpu.persistence for gpu in gpus))

        def find() -> list[tasks.Task]:
            return tasks.cuda(driver, init, management.used_by())

        hold = Hold(record, purpose, dumps.made(management.driver, driver.version, gpus, []), {}, ours=True)
        hold.dump.devices = given(record)
        hold.running = running

        def note(found: list[tasks.Task]) -> None:
            preflight.check(management, driver, init, found, gpus)
            preflight.check_host_memory(init, found, images)
            hold.dump.tasks = found
            hold.dump.flags = {**preflight.flags(found), "custom-storage": driver.custom_storage}
            hold.write(done=False)
            shown.close()
            shown.enter_context(moved.told(record.directory, "gpu-out", found))

        with deferred(), running(), ExitStack() as shown:
            try:
                engine.suspend(driver, find, lock_ms=int(lock_seconds * 1000), note=note, prefault=prefault)
            except BaseException:
                if _all_run(driver, hold.dump):  # else the journal stays, for `repair`
                    hold.forget()
                raise
    if not hold.dump.tasks:  # the library is loaded, and no context was made
        return None
    hold.write(done=True)
    return hold


def given(record: Record) -> list[str]:
    """CDI names of the devices that the container was given."""
    names = ((record.load() or record).facts.get("devices") or {}).get("names") or []
    return [str(name) for name in names]


def _all_run(driver: Driver, dump: Dump) -> bool:
    from cryoci.errors import CryociError
    from cryoci.shim.gpu.cuda import State

    try:
        return all(driver.state(task.pid) is State.RUNNING for task in dump.tasks if task.alive)
    except CryociError:
        return False


def image_facts(dump: Dump) -> dict[str, str]:
    """`io.cryoci.gpu.*` of the image: what a scheduler or a person matches before pulling it."""
    return {
        "gpu.driver": dump.driver,
        "gpu.names": json.dumps([gpu["name"] for gpu in dump.gpus]),
        "gpu.uuids": json.dumps([gpu["uuid"] for gpu in dump.gpus]),
        "gpu.capability": ",".join(dict.fromkeys(gpu["capability"] for gpu in dump.gpus)),
        "gpu.memory": str(preflight.vram(dump.tasks)),
    }
