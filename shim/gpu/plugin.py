# SPDX-License-Identifier: Apache-2.0
"""[gpu] engine = "plugin": CRIU's own CUDA plugin does the work, and cryoci sees that it really did.

The plugin turns itself off without a word when its directory, its command or the driver is missing, and swallows
errors of its restore (criu 4.0 to 4.2, plugins/cuda/cuda_plugin.c, and cr-restore.c: RESUME_DEVICES_LATE). So its
parts are looked for before, its name and the bytes in the images after, and every process' state after a restore.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cryoci.errors import CheckpointError, CryociError, NotFoundError, RestoreError, UnsupportedError
from cryoci.shim import paths, underlying
from cryoci.shim.argv import Invocation
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.criu.probe import CriuVersion
from cryoci.shim.gpu import below as runtime_below
from cryoci.shim.gpu import dump as dumps
from cryoci.shim.gpu import engine, hold, nvml, preflight, tasks
from cryoci.shim.gpu.cuda import Driver, State
from cryoci.shim.gpu.dump import Dump
from cryoci.shim.gpu.tasks import Task
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime

DIRECTORIES = ("/usr/lib/criu", "/usr/lib64/criu", "/usr/local/lib/criu")
LIBRARY = "cuda_plugin.so"
NAME = b"cuda_plugin"  # in inventory.img since criu 4.1
COMMAND = "cuda-checkpoint"
_NEEDS = b"check_and_remove_inventory_plugin"  # a symbol of criu 4.1 that its plugin calls


def directory(chosen: CriuOptions) -> str:
    """The plugin's directory. Raises NotFoundError."""
    for one in (chosen.libdir,) if chosen.libdir else DIRECTORIES:
        if os.path.isfile(f"{one}/{LIBRARY}"):
            return str(one)
    where = chosen.libdir or ", ".join(DIRECTORIES)
    raise NotFoundError(
        f"CRIU's CUDA plugin is not installed: no {LIBRARY} in {where}",
        hint='install it with CRIU, name its directory in [criu] libdir, or use [gpu] engine = "driver"',
    )


def check_build(libdir: str, criu: str) -> None:
    """Raise UnsupportedError when the plugin was built for another CRIU, whose symbols it would miss."""
    with open(f"{libdir}/{LIBRARY}", "rb") as plugin, open(criu, "rb") as program:
        if _NEEDS not in plugin.read():
            return
        whole = program.read()
        if (
            whole.startswith(b"\x7fELF") and _NEEDS not in whole
        ):  # else a script that starts it: it does not say which
            raise UnsupportedError(
                f"{libdir}/{LIBRARY} is of a newer build than {criu}: CRIU would stop with an undefined symbol",
                hint="install CRIU and its plugins from the same package",
            )


def variables() -> dict[bytes, bytes]:
    """Environment of the runtime: a PATH with cuda-checkpoint, cryoci's own where NVIDIA's is missing."""
    path = paths.environment("PATH", os.defpath)
    if underlying.search(COMMAND, "") is None:
        place = paths.run_directory() + "/bin"
        os.makedirs(place, mode=0o755, exist_ok=True)
        link = f"{place}/{COMMAND}"
        front = os.path.join(os.path.dirname(os.path.realpath(__file__)), "front.py")
        if not os.path.islink(link) or os.readlink(link) != front:
            try:
                os.unlink(link)
            except FileNotFoundError:
                pass
            os.symlink(front, link)
        path = f"{place}:{path}"
    return {b"PATH": os.fsencode(path)}


class PluginDumping:
    """One dump by the plugin; `dump` is None when the container has no CUDA."""

    def __init__(self, dump: Dump | None, libdir: str, timeout: int) -> None:
        self.dump = dump
        self.in_criu = dump is not None  # the driver works while CRIU does, and needs the processes' memory
        self._libdir = libdir
        self._timeout = timeout

    def options(self, chosen: CriuOptions) -> CriuOptions:
        """CRIU's options: its 10 s for all locks together are too short for real work."""
        if self.dump is None:
            return chosen
        return CriuOptions(timeout=self._timeout).merge(chosen).merge(CriuOptions(libdir=self._libdir))

    def variables(self) -> dict[bytes, bytes]:
        """Environment of the runtime."""
        if self.dump is None:
            return {}
        return {**variables(), b"CRIU_LIBS_DIR": os.fsencode(self._libdir)}


@contextmanager
def dumping(
    line: Invocation,
    below: Runtime,
    record: Record,
    chosen: CriuOptions,
    *,
    images: str,
    timeout: int,
    criu: CriuVersion,
) -> Iterator[PluginDumping]:
    """Look at what the plugin needs, and after the dump at what it left. Raises CheckpointError and others.

    After a dump that failed, processes that it forgot are brought back to their GPUs.
    """
    pid = int(runtime_below.state(line, below).get("pid", 0))
    if pid <= 0 or not tasks.any_cuda(pid):
        yield PluginDumping(None, "", timeout)
        return
    libdir = directory(chosen)
    check_build(libdir, criu.path)
    driver = Driver()
    with runtime_below.thawed(line, below), nvml.opened() as management:
        found = tasks.cuda(driver, pid, management.used_by())
        gpus = preflight.seen(management, pid)
        preflight.check(management, driver, pid, found, gpus)
        preflight.check_host_memory(pid, found, images)
        dump = dumps.made(
            management.driver,
            driver.version,
            gpus,
            found,
            flags={**preflight.flags(found), "custom-storage": driver.custom_storage},
            devices=hold.given(record),
            engine="plugin",
            criu=criu.version,
            plugins=["cuda_plugin"],
        )
        ran = [task for task in found if driver.state(task.pid) is State.RUNNING]
    try:
        yield PluginDumping(dump, libdir, timeout)
    finally:
        if not os.path.isfile(images + "/inventory.img"):
            bring_back(line, below, driver, ran)
    if os.path.isfile(images + "/inventory.img"):
        check_images(images, dump)
        dump.write(images)


def bring_back(line: Invocation, below: Runtime, driver: Driver, ran: Sequence[Task]) -> None:
    """Have the processes that `ran` run again, after a dump that failed. Raises CudaError, RestoreError.

    The plugin notes a process as checkpointed before it asks the driver to do that. When the driver refuses, it tries
    to restore what is only locked, is refused that too, and leaves the process locked for ever (4.0 to 4.2).
    """
    with runtime_below.thawed(line, below):
        engine.resume(
            driver, [one for one in ran if one.alive and driver.state(one.pid) is not State.RUNNING]
        )


def check_images(images: str, dump: Dump) -> None:
    """Raise CheckpointError when the plugin has silently done nothing."""
    with open(images + "/inventory.img", "rb") as f:
        listed = NAME in f.read()
    pages = sum(one.stat().st_size for one in os.scandir(images) if one.name.startswith("pages-"))
    if not listed or pages < preflight.vram(dump.tasks):
        why = "the images do not name it" if not listed else f"they hold {pages >> 20} MiB of memory"
        raise CheckpointError(
            f"CRIU's CUDA plugin has not saved the {preflight.vram(dump.tasks) >> 20} MiB on the GPUs: {why}",
            hint='see its lines in dump.log, or use [gpu] engine = "driver"',
        )


def finish(line: Invocation, below: Runtime, dump: Dump) -> None:
    """After a restore by the plugin, which reports success always: every process must run for the driver.

    Raises RestoreError; the container is gone then.
    """
    try:
        pid = int(runtime_below.state(line, below).get("pid", 0))
        driver = Driver()
        with runtime_below.thawed(line, below):
            found = tasks.cuda(driver, pid)
            states = [driver.state(task.pid) for task in found]
        if len(found) != len(dump.tasks) or any(state is not State.RUNNING for state in states):
            said = ", ".join(map(str, states)) or "none"
            raise RestoreError(
                f"CRIU's CUDA plugin reports success, but of {len(dump.tasks)} CUDA processes the states are: {said}",
                hint='see its lines in restore.log, or use [gpu] engine = "driver" for the next checkpoint',
            )
    except CryociError:
        runtime_below.kill(line, below)
        raise
