# SPDX-License-Identifier: Apache-2.0
"""What `cryoci-runtime restore` does about CUDA: plan before CRIU's restore, finish after it.

CRIU's plugin swallows errors of this step; here the driver is asked for every process' state at the end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cryoci.errors import CryociError, RestoreError, SpaceError, UnsupportedError
from cryoci.shim.argv import Invocation, parse, with_flag
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.gpu import below as runtime_below
from cryoci.shim.gpu import dump as dumps
from cryoci.shim.gpu import engine, helper, moved, nvml, plugin, preflight, select, tasks
from cryoci.shim.gpu.cuda import PAIRS, Driver
from cryoci.shim.gpu.dump import Dump
from cryoci.shim.gpu.dumping import no_plugins
from cryoci.shim.gpu.hold import Hold
from cryoci.shim.gpu.nvml import Gpu
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime

MAP_ANNOTATION = "io.cryoci.device-map"
MAP_VARIABLE = "CRYOCI_DEVICE_MAP"
_POLL = 0.01  # seconds


class Plan:
    """A restore that is known to be possible on this node: `chosen` maps old UUIDs to GPUs here."""

    def __init__(self, dump: Dump, chosen: dict[str, Gpu]) -> None:
        self.dump = dump
        self.chosen = chosen


def plan(images: str, spec: dict[str, Any]) -> Plan | None:
    """Look at gpu.dump and at this node before anything is restored; None for a checkpoint without CUDA.

    Raises UnsupportedError, SpaceError, UsageError, NotFoundError, ImageError.
    """
    dump = dumps.read(images)
    if dump is None or not dump.tasks:
        return None
    driver = Driver()
    annotations = spec.get("annotations") or {}
    asked = str(annotations.get(MAP_ANNOTATION) or os.environ.get(MAP_VARIABLE) or "auto")
    with nvml.opened() as management:
        _check_driver(dump, management.driver)
        given = _given(management.gpus(), spec)
        chosen = select.choose(dump.wanted, given, select.parse_map(asked))
        if select.pairs(chosen) and driver.version < PAIRS:
            raise UnsupportedError(
                f"driver {management.driver} cannot restore on another GPU than the checkpoint's",
                hint="install driver 580 (CUDA 13.0) or newer, or restore on the same GPU",
            )
    need, free = preflight.host_memory(dump.tasks), preflight.available_memory()
    if need > free:
        raise SpaceError(
            f"the checkpoint brings {need >> 20} MiB of GPU memory, and this node has {free >> 20} MiB of memory free",
            hint="free host memory: it passes through there on its way to the GPU",
        )
    return Plan(dump, chosen)


def bring_back(made: Plan, init: int, record: Record) -> None:
    """After CRIU's restore: bring the processes of the container back to GPUs, and see that they run there.

    Raises CudaError, RestoreError, SpaceError; the container is then not usable.
    """
    from cryoci.shim.engines.interrupt import deferred

    driver = helper.open_driver(persistent=all(gpu.persistence for gpu in made.chosen.values()))
    found = tasks.cuda(driver, init)
    inner, wanted = sorted(task.inner for task in found), sorted(task.inner for task in made.dump.tasks)
    if inner != wanted:
        raise RestoreError(
            f"the checkpoint has CUDA processes {wanted}, and the restored container has {inner}",
            hint="the checkpoint does not belong to its gpu.dump; use another one",
        )
    vram = {task.inner: task.vram for task in made.dump.tasks}
    for task in found:
        task.vram = vram[task.inner]
    pairs = select.pairs(made.chosen)
    mapping = {old: gpu.uuid for old, gpu in made.chosen.items()}
    made.dump.tasks = found
    journal = Hold(record, "restore", made.dump, mapping if pairs else {}, ours=True)
    with deferred():
        journal.write(done=False)
        with nvml.opened() as management:  # time has passed since the plan
            here = [gpu for gpu in management.gpus() if gpu.uuid in mapping.values()]
            select.choose(made.dump.wanted, here, mapping)
        with moved.told(record.directory, "gpu-in", found):
            engine.resume(driver, found, pairs)
        journal.forget()


class Restoring:
    """One restore by the runtime below, in two ways.

    With `--detach` the runtime returns when CRIU is done, and `finish` brings CUDA back. Without, it returns at
    the container's end: then a thread waits for the pid file, and its failure ends the container.
    """

    def __init__(self, made: Plan, line: Invocation, below: Runtime, record: Record) -> None:
        self._plan = made
        self._line = line
        self._below = below
        self._record = record
        self._detached = line.has("detach")
        self._pid_file = line.options.get("pid-file") or f"{record.directory}/restored.pid"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: CryociError | None = None
        self._by_plugin = made.dump.engine == "plugin"
        self._libdir = ""

    def prepare(self, line: Invocation, chosen: CriuOptions) -> tuple[Invocation, CriuOptions]:
        """The line and CRIU's options for the run of the runtime below."""
        if not self._detached and not self._by_plugin:
            _unlink(self._pid_file)  # of an earlier container
            line = parse(with_flag(line, "pid-file", self._pid_file), self._below.kind)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        if self._by_plugin:
            self._libdir = plugin.directory(chosen)
            return line, chosen.merge(CriuOptions(libdir=self._libdir))
        return line, chosen.merge(no_plugins())

    def variables(self) -> dict[bytes, bytes]:
        """Environment of the runtime: for crun, which hands CRIU no configuration."""
        if self._by_plugin:
            return {**plugin.variables(), b"CRIU_LIBS_DIR": os.fsencode(self._libdir)}
        return {b"CRIU_LIBS_DIR": os.fsencode(str(no_plugins().libdir))}

    def finish(self, status: int) -> int:
        """After the runtime: bring CUDA back, or see what the thread made of it. Returns the exit status.

        Raises CudaError, RestoreError, SpaceError; the container is gone then.
        """
        if self._thread is not None:
            self.stop()
            if self._error is not None:
                runtime_below.kill(self._line, self._below)
                raise self._error
        elif status == 0 and self._by_plugin:
            plugin.finish(self._line, self._below, self._plan.dump)
        elif status == 0:
            try:
                pid = int(runtime_below.state(self._line, self._below).get("pid", 0))
                bring_back(self._plan, pid, self._record)
            except BaseException:
                runtime_below.kill(self._line, self._below)
                raise
        return status

    def stop(self) -> None:
        """End the thread, if there is one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            if self._line.options.get("pid-file") is None:
                _unlink(self._pid_file)

    def _watch(self) -> None:
        while not self._stop.wait(_POLL):
            try:
                with open(self._pid_file) as f:
                    pid = int(f.read())
            except (OSError, ValueError):
                continue
            try:
                bring_back(self._plan, pid, self._record)
            except CryociError as e:
                self._error = e
                runtime_below.signal(self._line, self._below, "KILL")
            return


@contextmanager
def restoring(
    line: Invocation, below: Runtime, record: Record, spec: dict[str, Any], *, images: str
) -> Iterator[Restoring | None]:
    """The GPU part of a restore; of None when the checkpoint has no CUDA. Raises what `plan` raises."""
    made = plan(images, spec)
    if made is None:
        yield None
        return
    one = Restoring(made, line, below, record)
    try:
        yield one
    finally:
        one.stop()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _check_driver(dump: Dump, here: str) -> None:
    made, now = int(dump.driver.split(".")[0] or 0), int(here.split(".")[0])
    if now < made:
        raise UnsupportedError(
            f"the checkpoint was made by driver {dump.driver}, and this node has {here}",
            hint=f"install driver {made} or newer on this node",
        )


def _given(gpus: list[Gpu], spec: dict[str, Any]) -> list[Gpu]:
    """The GPUs whose device nodes the container gets; all where its spec names none."""
    linux = spec.get("linux") or {}
    given = {str(one.get("path")) for one in linux.get("devices") or () if isinstance(one, dict)}
    given |= {str(one.get("destination")) for one in spec.get("mounts") or () if isinstance(one, dict)}
    return [gpu for gpu in gpus if f"/dev/nvidia{gpu.minor}" in given] or gpus
