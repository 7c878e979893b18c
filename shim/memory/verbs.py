# SPDX-License-Identifier: Apache-2.0
"""Memory out of band around the runtime's verbs: what `checkpoint` and `restore` call."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from cryoci.command import run
from cryoci.errors import CryociError, RestoreError, UnsupportedError
from cryoci.shim import cgroup, config, failure, operation
from cryoci.shim.argv import Invocation, parse, with_flag
from cryoci.shim.memory import capture, dump, index, prefetch, repair, undump
from cryoci.shim.memory.parent import Parent
from cryoci.shim.memory.sink import Sink
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime

# Flags of checkpoint under which CRIU moves all memory: it does not write all of it, or not to the image directory.
FOREIGN = ("criu-memory", "parent-path", "pre-dump", "lazy-pages", "page-server", "auto-dedup")


def checkpoint(
    line: Invocation, below: Runtime, record: Record, act: Callable[[], int], by_criu: str = ""
) -> int:
    """Run `act`, the checkpoint proper, with large memory out of the way if config.toml says so.

    `by_criu` is a reason to leave all memory to CRIU.

    Returns its status. Raises CheckpointError, SpaceError, ConflictError, and RestoreError or ImageError when
    the container lives on and its memory could not be put back: it is stopped then, and its journal stays.
    Six flags are cryoci's own: with --hold-memory the memory stays out until the caller repairs or ends the
    container, --memory-returns says that it will be put back, with --criu-memory CRIU moves it all,
    --memory-parent names images of an earlier checkpoint, whose chunks are linked where they are the same,
    --memory-options has KEY=VALUE,... over [memory] of config.toml, and --memory-sink is the socket of a program
    that stores chunks (sink.py): whatever fails after the drop, that program puts the memory back.
    """
    settings = config.load().memory
    asked = line.options.get("memory-options")
    if asked:
        settings = settings.changed(asked)
    if by_criu and line.has("memory-sink"):
        raise UnsupportedError(
            f"memory cannot go to where it is stored at once: {by_criu}", hint="leave out --memory-sink"
        )
    if by_criu or not settings.parallel or any(line.has(flag) for flag in FOREIGN):
        return act()
    directory = operation.image_directory(line)
    parent = _parent(line)
    returns = line.has("memory-returns") or (line.has("leave-running") and not line.has("hold-memory"))
    sink = _sink(line)
    try:
        note = dump.take_out(record, _init(line, below), directory, settings, parent, returns, sink)
    except UnsupportedError as e:
        if sink is not None:  # CRIU would write it all to where it was not to go
            raise
        failure.say(line, f"CRIU moves all memory itself: {e.message}", e.hint, level="warning")
        note = None
    finally:
        if parent is not None:
            parent.close()
        if sink is not None:
            sink.close()
    if note is None:
        return act()
    status = 1
    try:
        status = act()
        if status == 0:
            dump.conclude(record, note)
    finally:
        held = (status == 0 and line.has("hold-memory")) or bool(note.source)
        if not held:
            if any(member.alive for member in note.members):
                dump.put_back(record, note, settings)
            else:
                repair.forget(record, note)
            if status != 0:
                capture.remove(directory)
    return status


def restore(line: Invocation, below: Runtime, record: Record, act: Callable[[Invocation], int]) -> int:
    """Run `act`, the restore proper, on the line to use, and fill what its checkpoint has out of band.

    Returns its status. Raises ImageError, RestoreError...: nothing of the container is left then.
    """
    directory = operation.image_directory(line)
    if not index.exists(directory):
        return act(line)
    work = line.options.get("work-path") or directory
    pid_file = line.options.get("pid-file") or f"{record.directory}/pid"
    try:
        line = parse(with_flag(line, "image-path", undump.prepare(record, directory)), below.kind)
        line = parse(with_flag(line, "work-path", work), below.kind)
        line = parse(with_flag(line, "pid-file", pid_file), below.kind)
        with suppress(FileNotFoundError):
            os.unlink(pid_file)
        if line.has("detach"):
            with prefetch.ahead(record, directory, config.load().memory):
                status = act(line)
            if status == 0:
                _complete(line, below, record, pid_file, directory)
        else:
            status = _beside(line, below, record, act, pid_file, directory)
    finally:
        undump.cancel(record)
        if pid_file == f"{record.directory}/pid":
            with suppress(OSError):
                os.unlink(pid_file)
    return status


def _complete(line: Invocation, below: Runtime, record: Record, pid_file: str, directory: str) -> None:
    """Fill a container that stands restored; end it when that fails."""
    try:
        with open(pid_file) as f:
            init = int(f.read())
        if below.kind == "crun":
            cgroup.gather(init)
        undump.complete(record, init, directory, config.load().memory)
    except BaseException as e:
        run([*_command(line, below), "delete", "--force", record.id], check=False)
        if isinstance(e, OSError | ValueError):
            raise RestoreError(f"the memory of container {record.id} could not be filled: {e}") from e
        raise


def _beside(
    line: Invocation,
    below: Runtime,
    record: Record,
    act: Callable[[Invocation], int],
    pid_file: str,
    directory: str,
) -> int:
    """The same for a restore in the foreground, which lasts as long as the container: fill from a child."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            while not os.path.exists(pid_file) or os.path.getsize(pid_file) == 0:
                time.sleep(0.005)
            _complete(line, below, record, pid_file, directory)
            status = 0
        except CryociError as e:
            failure.say(line, e.message, e.hint)
        finally:
            os._exit(status)
    try:
        status = act(line)
    finally:
        done, filled = os.waitpid(child, os.WNOHANG)
        if not done:  # the restore has failed, or the container has ended before
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return status if not done or filled == 0 else 1


def _parent(line: Invocation) -> Parent | None:
    """The earlier checkpoint that --memory-parent names; None, and a warning, when it is of no use."""
    directory = line.options.get("memory-parent")
    if not directory:
        return None
    try:
        return Parent(directory)
    except CryociError as e:
        failure.say(line, f"nothing is shared with {directory}: {e.message}", e.hint, level="warning")
        return None


def _sink(line: Invocation) -> Sink | None:
    path = line.options.get("memory-sink")
    if not path:
        return None
    if not line.has("hold-memory"):
        raise UnsupportedError(
            "--memory-sink leaves it to its caller to put memory back", hint="add --hold-memory"
        )
    return Sink(path)


def _init(line: Invocation, below: Runtime) -> int:
    """Pid of the container's first process. Raises UnsupportedError when the runtime does not say."""
    try:
        state = json.loads(run([*_command(line, below), "state", line.id or ""]).stdout)
        return int(state["pid"])
    except (CryociError, ValueError, KeyError, TypeError) as e:
        raise UnsupportedError(f"{below.name} does not tell the container's process: {e}") from e


def _command(line: Invocation, below: Runtime) -> list[str]:
    return [below.path, *(["--root", line.root] if line.root else [])]
