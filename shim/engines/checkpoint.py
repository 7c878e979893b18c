# SPDX-License-Identifier: Apache-2.0
"""`cryoci checkpoint`: a running container becomes a checkpoint directory, and nothing is lost on the way.

    freeze -> dump, leaving it alive -> copy its file system -> [caller packages] -> stop it, or let it run on

The container stays frozen until the caller has stored the checkpoint, so that whatever fails before leaves
it running as if nothing had happened. Two cases differ: with `leave_running` it runs on as soon as its file
system is copied, and with established TCP connections that are to move (no `leave_running`) CRIU itself
must end the processes, or the kernel would reset the connections; then a failure restores it in place.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cryoci import trace
from cryoci.command import run
from cryoci.errors import (
    CheckpointError,
    ConflictError,
    CryociError,
    PrivilegeError,
    ToolError,
)
from cryoci.files import read_json, sync_tree, write_json
from cryoci.shim import app, cgroup, hooked, record, rootfs
from cryoci.shim.criu import log
from cryoci.shim.criu.probe import FROZEN, probe
from cryoci.shim.engines import asleep, checks, gpu, left, outlived, processes, wake
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.interrupt import deferred
from cryoci.shim.engines.options import DumpOptions, criu_flags
from cryoci.shim.gpu import amd, dump
from cryoci.shim.gpu.hold import Hold, image_facts
from cryoci.shim.memory import index
from cryoci.shim.memory import repair as memory
from cryoci.shim.memory.supply import Supplier

T = TypeVar("T")
_CONTAINERD = "/run/containerd/"  # below it containerd's shim has the --root of its runtimes
_STOP_SECONDS = 30.0


@dataclass
class Checkpoint:
    """A dumped container: `directory` holds the checkpoint; times are in seconds.

    `warnings` say which app hooks failed, where that is no reason to fail.
    """

    container: Container
    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@contextmanager
def checkpoint(container: Container, directory: Path, options: DumpOptions) -> Iterator[Checkpoint]:
    """Checkpoint `container` into `directory` (made here) for the time of a with block.

    Leaving the block normally ends the container (or leaves it running); leaving it by an exception puts the
    container back to how it was and removes `directory`. Raises CheckpointError, ConflictError, SpaceError,
    PrivilegeError and what the tools raise.
    """
    if os.geteuid() != 0:
        raise PrivilegeError("a checkpoint needs root: CRIU reads other processes' memory", hint="use sudo")
    container.must_run()
    checks.moving(container, options)
    checks.sink(container, options)
    checks.user(container)
    done = Checkpoint(container, directory)
    before, after = app.both(container, options.hooks)
    owed = [after]  # to a container that is not ended
    kept = Path(record.Record(container.root, container.id).directory)
    with ExitStack() as undo, processes.exclusive(kept, f"checkpoint of container {container.name}"):
        journal = kept / processes.HELD
        _make(directory)
        undo.callback(left.discard, container, directory, durable=options.durable)
        now = container.state()  # until here another cryoci may have had it frozen
        init = int(now.get("pid", 0))
        checks.plugin(container, init, options)
        checks.space(container, init, directory, options)
        was_paused = _was_paused(now, journal)
        # what a killed cryoci has left
        memory.repair(record.Record(container.root, container.id), options.supplier)
        before = wake.due(container, before, was_paused)
        if before.steps:
            undo.callback(wake.settle, container, owed, done.warnings)
            lull = lambda: wake.prepare(container, before, asleep.Asleep(after), done.warnings)  # noqa: E731
            _timed(done, "pre-checkpoint hooks", lull)
        held = _timed(done, "gpu", lambda: gpu.hold(container, init, "checkpoint", images=directory))
        if held is None:
            done.seconds.pop("gpu")
        else:
            undo.push(lambda kind, error, trace: _gpu_back(held, error))
        write_json(journal, {"pid": os.getpid(), "paused": was_paused})
        undo.callback(left.release, container, journal)
        undo.push(lambda kind, error, trace: _back(container, was_paused, options.supplier, error))
        # restored by a plain crun, it has processes that its freezer does not reach
        cgroup.gather(init)
        group = cgroup.path_of(init)
        if now.get("status") != "paused" or container.status != "paused":  # hooks have it run
            _timed(done, "freeze", lambda: _turn(container, "pause", "paused"))
        moving = checks.moves_connections(options)
        if moving:  # its engine unmounts these when the processes are gone
            _timed(done, "volumes", lambda: _save_volumes(container, directory, options))
        _timed(done, "dump", lambda: _dump(container, directory, options, leave=not moving))
        if moving:
            undo.pop_all()
            undo.callback(journal.unlink, missing_ok=True)
            if before.steps:
                undo.callback(wake.settle, container, owed, done.warnings)
            undo.push(
                lambda kind, error, trace: error is not None and _revive(container, directory, options)
            )
        _timed(done, "file system", lambda: _save_files(container, directory, options))
        if not moving:
            _timed(done, "volumes", lambda: _save_volumes(container, directory, options))
        _describe(container, directory, options)
        if options.durable:
            sync_tree(directory)
        if options.leave_running and not _timed(done, "resume", lambda: _goes_on(done, was_paused, options)):
            if held is not None:
                held.end()
        elif options.leave_running:
            if held is not None:
                _timed(done, "gpu restore", held.release)
            if after.steps and not was_paused:
                _timed(done, "post-restore hooks", lambda: wake.settle(container, owed, done.warnings))
        yield done
        undo.pop_all()  # it is stored: whatever fails from here on must not take it back
        try:
            if not options.leave_running:
                with deferred():  # half ended it would be neither here nor there
                    _timed(done, "stop", lambda: _end(container, group, gone=moving))
                    if held is not None:
                        held.end()
        finally:
            left.release(container, journal)
            if not options.leave_running:
                asleep.forget(container)


def _gpu_back(held: Hold, error: BaseException | None) -> bool:
    """Bring CUDA back on the way out of a failure, whose reason must not get lost."""
    try:
        held.release()
    except CryociError as e:
        raise CheckpointError(
            f"{error}; and then: {e.message}", hint="bring it back by `cryoci repair CONTAINER`"
        ) from error
    return False


def _was_paused(now: dict[str, Any], journal: Path) -> bool:
    """Was the container, of which the runtime says `now`, paused by its user? Not by a cryoci that was killed."""
    try:
        left = read_json(journal)
        return bool(left["paused"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(now.get("status")) == "paused"


def _turn(container: Container, verb: str, wanted: str) -> None:
    """Freeze or thaw it. Raises ToolError unless it is so already."""
    try:
        container.call(verb)
    except ToolError:
        if container.status != wanted:
            raise


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        if not directory.is_dir() or any(directory.iterdir()):
            raise ConflictError(
                f"{directory} exists and is not an empty directory", hint="give another one with -o"
            ) from None
        directory.chmod(0o700)


def _dump(container: Container, directory: Path, options: DumpOptions, *, leave: bool) -> None:
    criu = probe()
    if criu.version < FROZEN:
        raise CheckpointError(
            f"criu {criu} cannot dump a frozen container",
            hint="install criu 4.1 or newer (Debian trixie has it)",
        )
    images = directory / "checkpoint"
    images.mkdir(mode=0o700)
    words = ["--image-path", str(images), "--work-path", str(directory)]
    if leave:
        words += ["--leave-running", "--hold-memory"]
    if options.leave_running:
        words.append("--memory-returns")
    if options.memory:
        words += ["--memory-options", ",".join(options.memory)]
    if checks.below_podman(container):
        words.append("--criu-memory")  # podman will restore it by that runtime, without cryoci
    if options.sink is not None:
        words += ["--memory-sink", options.sink.path]
    if options.parent is not None:
        words += ["--memory-parent", str(options.parent / "checkpoint")]
    words += criu_flags(options.criu, "dump")
    try:
        container.call("checkpoint", *words)
    except ToolError as e:
        if options.sink is not None and options.sink.error is not None:
            raise options.sink.error from e
        cause = log.explain_failure(str(directory / "dump.log"), "dump")
        kept = record.Record(container.root, container.id).keep_log("dump", str(directory / "dump.log"))
        if cause is None:
            raise CheckpointError(
                f"container {container.name} could not be dumped: {e.message}",
                hint=f"see CRIU's log: {kept}"
                if kept
                else "CRIU was not reached, or killed at once: see `criu check` and dmesg",
            ) from e
        raise CheckpointError(
            f"container {container.name} could not be dumped: {cause.summary}",
            hint=f"{cause.hint} (log: {kept})",
        ) from e
    if not (images / "inventory.img").is_file():
        raise CheckpointError(f"{container.runtime} reports success but left no image in {images}")


def _save_files(container: Container, directory: Path, options: DumpOptions) -> None:
    """The file system at the moment of the dump: nothing in the container runs meanwhile."""
    mounts = [str(m.get("destination")) for m in container.spec.get("mounts") or ()]
    choice = options.rootfs
    if choice == "auto":
        choice = "diff" if container.overlay is not None and container.engine == "podman" else "full"
    if choice == "full":
        rootfs.save_all(container.rootfs, mounts, directory / "rootfs.tar")
    elif choice == "diff":
        if container.overlay is None:
            raise CheckpointError(
                f"the changes of container {container.name} cannot be told from its base: {container.rootfs} is "
                "no overlay mount",
                hint="use --rootfs full",
            )
        diff, deleted = directory / "rootfs-diff.tar", directory / "deleted.files"
        rootfs.save_diff(container.rootfs, container.overlay, mounts, diff, deleted)


def _save_volumes(container: Container, directory: Path, options: DumpOptions) -> None:
    """What is mounted into the container and travels with it, and its log."""
    if container.shm is not None and container.shm.is_dir():
        rootfs.save_tree(container.shm, directory / "devshm-checkpoint.tar")
    if options.volumes and container.volumes:
        (directory / "volumes").mkdir(mode=0o700)
        for volume in container.volumes:
            rootfs.save_tree(volume.source, directory / "volumes" / f"{volume.name}.tar")
    if container.log is not None and container.log.is_file():
        shutil.copyfile(container.log, directory / "ctr.log")


def _describe(container: Container, directory: Path, options: DumpOptions) -> None:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    gpus = dump.read(str(directory / "checkpoint"))
    facts = {
        **hooked.facts(container.id),
        **container.facts,
        **(image_facts(gpus) if gpus is not None else {}),
        **amd.image_facts(str(directory / "checkpoint")),
        "engine.name": container.engine,
        "container.name": container.name,
        "container.id": container.id,
        "criu.version": str(probe()),
        "checkpointed": now,
        "memory.format": index.FORMAT if index.exists(str(directory / "checkpoint")) else "",
        **node_facts(),
    }
    dumps = {**container.dumps, "spec.dump": container.spec}
    if container.engine != "podman":
        dumps["config.dump"] = {**container.dumps["config.dump"], "checkpointedTime": now}
    for name, value in dumps.items():
        write_json(directory / name, value)
    own: dict[str, Any] = {
        "version": 1,
        "engine": container.engine,
        "container": {"id": container.id, "name": container.name},
        "criu": options.criu.to_mapping(),
        "volumes": sorted(v.name for v in container.volumes) if options.volumes else [],
        "annotations": {key: value for key, value in facts.items() if value},
    }
    write_json(directory / "cryoci.json", own)


def node_facts() -> dict[str, str]:
    """Facts about this node: what a restore elsewhere compares."""
    release: dict[str, str] = {}
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        pass
    return {
        "host.arch": platform.machine(),
        "host.kernel": platform.release(),
        "cgroup.version": "v2" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "v1",
        "distribution.name": release.get("ID", ""),
        "distribution.version": release.get("VERSION_ID", ""),
    }


def _thaw(
    container: Container, was_paused: bool, supplier: Supplier | None, *, frozen: bool | None = None
) -> None:
    """Let the container run on, and make sure that it does. None: whether it is `frozen` is not known."""
    memory.repair(record.Record(container.root, container.id), supplier)
    if frozen is None:  # asked only now, for a repair leaves it frozen
        frozen = container.status == "paused"
    if frozen and not was_paused:
        _turn(container, "resume", "running")
    status = container.status
    if status != ("paused" if was_paused else "running"):
        raise CheckpointError(
            f"container {container.name} is {status} after the checkpoint",
            hint=f"see its log, and CRIU's: {record.Record(container.root, container.id).log('dump')}",
        )


def _goes_on(done: Checkpoint, was_paused: bool, options: DumpOptions) -> bool:
    def thaw() -> None:
        _thaw(done.container, was_paused, options.supplier, frozen=True)

    return outlived.goes_on(done.container, thaw, done.warnings)


def _back(
    container: Container, was_paused: bool, supplier: Supplier | None, error: BaseException | None
) -> bool:
    """`_thaw` on the way out of a failure, whose reason must not get lost."""
    try:
        with deferred():
            _thaw(container, was_paused, supplier)
    except CryociError as e:
        raise CheckpointError(f"{error}; and then: {e.message}", hint=e.hint) from error
    return False


def _end(container: Container, group: str | None, *, gone: bool) -> None:
    """End the container: its checkpoint is stored. It is frozen, so it does not run between the two.

    `group`, its cgroup, is waited for: a large process has its sockets until all of its memory is given back.
    """
    if not gone:
        container.call("kill", after=("KILL",), check=False)
        container.call("resume", check=False)  # cgroup v1: a frozen task dies only when thawed
    deadline = time.monotonic() + _STOP_SECONDS
    ended = False
    while time.monotonic() < deadline:
        ended = ended or outlived.ended(container)
        if ended and not cgroup.populated(group):
            break
        time.sleep(0.05)
    if not ended:
        raise CheckpointError(
            f"container {container.name} did not end within {_STOP_SECONDS:g} s of its checkpoint",
            hint="the checkpoint is stored; end the container by its engine",
        )
    memory.abandon(record.Record(container.root, container.id))
    if container.engine == "podman":
        _await_podman(container)
    elif not (container.root or "").startswith(
        _CONTAINERD
    ):  # it deletes its own, and stumbles if they are gone
        container.call("delete", "--force", check=False)


def _await_podman(container: Container) -> None:
    """Wait until podman has noticed; its monitor cleans up on its own."""
    run(["podman", "wait", "--ignore", "--", container.id], check=False, timeout=_STOP_SECONDS)


def _revive(container: Container, directory: Path, options: DumpOptions) -> bool:
    """Undo a dump that ended the processes: restore them in place. Keeps what was dumped when that fails."""
    from cryoci.shim.engines import restore

    try:
        with deferred():
            restore.in_place(container, directory, options.criu)
    except (CryociError, OSError) as e:
        kept = directory
        if not options.durable:  # it lies in a scratch directory of the caller, which goes
            kept = left.aside(container, directory)
        raise CheckpointError(
            f"container {container.name} was ended by its checkpoint, the checkpoint could not be stored, and "
            f"the container could not be restored in place: {e.message if isinstance(e, CryociError) else e}",
            hint=f"what was dumped is kept: `cryoci restore {kept}`",
        ) from e
    shutil.rmtree(directory, ignore_errors=True)
    return False


def _timed(done: Checkpoint, name: str, act: Callable[[], T]) -> T:
    with trace.timed(done.seconds, name):
        return act()
