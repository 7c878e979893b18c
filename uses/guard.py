# SPDX-License-Identifier: Apache-2.0
"""`cryoci guard`: checkpoints of a running container at intervals, and the newest good one back after a crash.

    watch -> checkpoint, leaving it running -> watch ... -> crash -> restore -> watch ...

What the guard does is in its state file before it does it, so a guard that was killed goes on where it was. It
ends when the container has finished, or was stopped, removed or moved by somebody: only a crash is made up for.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryoci.command import run
from cryoci.errors import (
    ConflictError,
    CryociError,
    HookError,
    ImageError,
    NotFoundError,
    RestoreError,
    UsageError,
)
from cryoci.ociimage.progress import Work, silent
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import app, untrusted
from cryoci.shim import engines as containers
from cryoci.shim.engines import podman, processes
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import DumpOptions, Restored, RestoreOptions
from cryoci.shim.engines.restore import restore
from cryoci.uses import guard_end, guard_places, guard_state, incremental
from cryoci.uses.guard_state import Kept, Recovery, State
from cryoci.uses.metrics import Metric

_ATTEMPTS = 3
_END_SECONDS = 60.0
_LONGEST_WAIT = 86400.0  # seconds: poll(2) counts milliseconds in an int
_LONGEST_PAUSE = 60.0  # seconds between two attempts to restore


@dataclass(frozen=True)
class Options:
    """How to guard; times in seconds.

    A container that crashes within `stable` of its restore makes that checkpoint suspect. `dump` is how
    checkpoints are taken; `incremental` ones share the memory that did not change (uses/incremental.py). `sealing`
    says who can read those in a registry.
    """

    every: float = 600.0
    to: str = "disk"
    keep: int = 2
    restores: bool = True
    stable: float = 60.0
    root: str | None = None
    dump: DumpOptions = field(default_factory=lambda: DumpOptions(leave_running=True))
    hooks: app.Choice = field(default_factory=app.Choice)
    registry: RegistryOptions | None = None
    incremental: bool = False
    sealing: guard_places.Sealing = field(default_factory=guard_places.Sealing)


class Guard:
    """The guard of container `name`; `say` gets one line about each thing that happened, `work` tells of long ones."""

    def __init__(self, name: str, options: Options, say: Callable[[str], None], work: Work = silent) -> None:
        self._options = options
        self._say = say
        options.sealing.check(options.to, incremental=options.incremental, restores=options.restores)
        sharing = guard_places.Sharing(options.incremental, say, options.registry)
        self._place = guard_places.place(name, options.to, options.registry, sharing, work, options.sealing)
        self._backoff = 0.0
        known = guard_state.load(name)
        if known is not None and known.alive:
            raise ConflictError(
                f"container {name} is guarded already, by process {known.pid}",
                hint=f"see `cryoci guard status`; end it by `cryoci guard stop {name}`",
            )
        self.state = known or State(name, "", options.root, options.to, options.every, options.keep)
        self._begun = known is not None

    def metrics(self) -> list[Metric]:
        """Numbers for Prometheus."""
        state, labels = self.state, {"container": self.state.name}
        newest = max(state.kept, key=lambda kept: kept.number, default=None)

        def one(name: str, kind: Literal["gauge", "counter"], text: str, value: float) -> Metric:
            return Metric(f"cryoci_guard_{name}", kind, text, [(labels, value)])

        found = [
            one("checkpoints_total", "counter", "Checkpoints taken.", state.taken),
            one("failures_total", "counter", "Checkpoints that failed.", state.failed),
            one("recoveries_total", "counter", "Restores after a crash.", len(state.recoveries)),
            one("lost_seconds_total", "counter", "Work lost in crashes.", state.lost),
            one("kept", "gauge", "Checkpoints kept.", len(state.kept)),
        ]
        if newest is not None:
            found += [
                one(
                    "newest_timestamp_seconds",
                    "gauge",
                    "When the newest checkpoint was taken.",
                    newest.taken,
                ),
                one("pause_seconds", "gauge", "Pause of the newest checkpoint.", newest.pause),
                one("size_bytes", "gauge", "Size of the newest checkpoint.", newest.size),
            ]
        return found

    def run(self) -> State:
        """Guard until the container has ended by somebody's will. Raises RestoreError when all is lost."""
        place = guard_state.directory(self.state.name)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with processes.lock(place / "lock") as locked:
            if not locked:
                raise ConflictError(
                    f"container {self.state.name} is guarded already", hint="cryoci guard status"
                )
            try:
                return self._run()
            finally:
                self.state.pid = 0
                if self._begun:
                    self.state.save()
                else:  # there was nothing to guard
                    guard_state.forget(self.state)

    def _run(self) -> State:
        state, options = self.state, self._options
        state.to, state.every, state.keep, state.root = options.to, options.every, options.keep, options.root
        state.pid, state.started = os.getpid(), guard_state.start_time(os.getpid())
        state.kept = [kept for kept in state.kept if self._place.has(kept)]
        container = self._begin()
        self._begun = True
        while True:
            state.phase = "watching"
            state.save()
            end = self._watch(container)
            if end.how == "crashed" and options.restores:
                self._say(f"{state.name} crashed {end.detail}".rstrip())
                container = self._bring_back(container)
            elif end.how == "restarted":
                self._say(f"{state.name} was restarted by somebody else; its work since then is guarded")
                container = self._find()
            else:
                state.phase, state.message = end.how, end.detail
                self._say(f"{state.name} {end.how} {end.detail}".rstrip() + ": the guard ends")
                return state

    # the container

    def _find(self) -> Container:
        found = containers.find(self.state.name, root=self.state.root)
        _check(found, restores=self._options.restores, rootfs=self._options.dump.rootfs)
        self.state.engine = found.engine
        self.state.bundle = str(found.bundle) if self._options.dump.rootfs == "none" else ""
        return found

    def _begin(self) -> Container:
        """The container; one that crashed while its guard was gone is brought back."""
        state = self.state
        unfinished = state.phase in ("watching", "restoring") and bool(state.kept) and self._options.restores
        try:
            found = self._find()
        except NotFoundError:
            if not (unfinished and state.phase == "restoring"):
                raise
            self._say(f"{state.name} crashed, and its guard was killed while it restored it")
            return self._bring_back(None)
        if _status(found) in ("running", "paused"):
            self._say(
                f"guarding {state.name}: a checkpoint every {state.every:g} s to {state.to}, {state.keep} kept"
            )
            return found
        end = guard_end.end(found, -1, -1)
        if not unfinished or end.how != "crashed":
            raise ConflictError(
                f"container {state.name} does not run: {end.how} {end.detail}".rstrip(),
                hint="start it, then guard it",
            )
        self._say(f"{state.name} crashed {end.detail} while nobody guarded it")
        return self._bring_back(found)

    def _watch(self, container: Container) -> guard_end.End:
        """Take checkpoints until the container has ended; returns how it did."""
        pid = 0
        try:
            pid = int(container.state().get("pid", 0))
            pidfd = os.pidfd_open(pid)
        except (OSError, NotFoundError):
            return guard_end.end(container, pid, -1)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            last = max((kept.taken for kept in self.state.kept), default=0.0)
            due = min(last, time.time()) + self._options.every
            if self.state.recoveries:  # what was just restored is on disk already
                due = max(due, self.state.recoveries[-1].at + self._options.every)
            while True:
                left = min(max(0.0, due - time.time()), self._options.every)  # the clock may be set back
                if poll.poll(min(left, _LONGEST_WAIT) * 1000):
                    return guard_end.end(container, pid, pidfd)
                if left > _LONGEST_WAIT:
                    continue
                self._take(container)
                due = time.time() + self._options.every
        finally:
            os.close(pidfd)

    # checkpoints

    def _take(self, container: Container) -> None:
        """One more checkpoint, and one less of the old ones. A failure is told, and the next is tried in time."""
        state = self.state
        started = time.monotonic()
        try:
            kept = self._place.take(container, state.taken + 1, self._options.dump)
        except (CryociError, OSError) as e:
            state.failed += 1
            state.message = e.message if isinstance(e, CryociError) else str(e)
            state.save()
            self._say(f"no checkpoint: {state.message}")
            return
        state.taken, state.message = kept.number, ""
        state.kept.append(kept)
        state.save()
        took = time.monotonic() - started
        shared = f", {kept.shared / 1e6:.1f} of them shared," if self._options.incremental else ""
        self._say(
            f"checkpoint {kept.number}: paused {kept.pause:.3f} s, {kept.size / 1e6:.1f} MB{shared} in {took:.2f} s"
        )
        self._backoff = 0.0
        self._retire()

    def _retire(self) -> None:
        """Drop the oldest beyond those to keep, of what this guard has made; suspects first."""
        state = self.state
        for old in sorted(state.kept, key=lambda kept: (not kept.suspect, kept.number))[: -state.keep]:
            if problem := guard_places.try_drop(self._place, old):
                self._say(f"checkpoint {old.number} could not be removed: {problem}")
            state.kept.remove(old)
        state.save()

    # recovery

    def _bring_back(self, crashed: Container | None) -> Container:
        """Restore the newest good checkpoint. Raises RestoreError when there is none."""
        state, at = self.state, time.time()
        state.phase = "restoring"
        last = state.recoveries[-1] if state.recoveries else None
        if last is not None and at - (last.at + last.down) < self._options.stable:
            for kept in state.kept:
                kept.suspect = kept.suspect or kept.number == last.number
        state.save()
        self._clear(crashed)
        for kept in sorted(state.kept, key=lambda kept: -kept.number):
            made = None if kept.suspect else self._attempt(kept)
            if made is None:
                continue
            now = time.time()
            # frozen for a checkpoint it did not work, so nothing of that time is lost
            paused = sum(one.pause for one in state.kept if one.number >= kept.number)
            recovery = Recovery(at, kept.number, max(0.0, at - kept.taken - paused), now - at)
            state.recoveries.append(recovery)
            state.save()
            self._say(
                f"restored {state.name} from checkpoint {kept.number}: {recovery.lost:.1f} s of work lost, "
                f"{recovery.down:.2f} s down"
            )
            for warning in made.warnings:
                self._say(warning)
            return self._find()
        state.phase, state.message = "lost", "no checkpoint is left that holds"
        state.save()
        raise RestoreError(
            f"container {state.name} crashed, and none of its {len(state.kept)} checkpoints holds",
            hint=f"they are kept in {state.to}; see what it said, start it from scratch, and guard it again",
        )

    def _attempt(self, kept: Kept) -> Restored | None:
        """Restore a checkpoint: a broken one is tried once, what this node or the registry refuses more often."""
        for _ in range(_ATTEMPTS):
            time.sleep(self._backoff)
            self._backoff = min(max(1.0, 2 * self._backoff), _LONGEST_PAUSE)
            try:
                return self._restore(kept)
            except (CryociError, OSError) as e:
                why = e.message if isinstance(e, CryociError) else str(e)
                self._say(f"checkpoint {kept.number} cannot be restored: {why}")
                if isinstance(e, (RestoreError, ImageError, HookError)):
                    kept.suspect = True
                    self.state.save()
                    break
        return None

    def _restore(self, kept: Kept) -> Restored:
        state = self.state
        options = RestoreOptions(
            name=state.name,
            engine=state.engine,
            root=state.root,
            bundle=Path(state.bundle) if state.bundle else None,
            allow=untrusted.ALLOWABLE,  # it was made here, and kept where only root writes, or by its digest
            hooks=self._options.hooks,
        )
        with self._place.open(kept) as directory:
            made = restore(directory, options)
        if self._options.incremental:
            incremental.restored(made, state.root, kept.where)
        return made

    def _clear(self, crashed: Container | None) -> None:
        """Free the name of what has crashed: podman's container is kept, renamed; only the last one."""
        if crashed is None:
            return
        if crashed.engine != "podman":
            crashed.call("delete", "--force", check=False)
            return
        state = self.state
        with ExitStack() as after:
            if state.crashed and state.crashed != crashed.id:
                old = state.crashed
                run(["podman", "rm", "--force", "--time=0", "--", old], check=False)
            state.crashed = crashed.id
            after.callback(state.save)
            run(["podman", "rename", "--", crashed.id, f"{state.name}-crashed-{int(time.time())}"])


def stop(name: str, *, remove: bool, registry: RegistryOptions | None = None) -> bool:
    """End the guard of container `name`; returns whether one ran. With `remove` its checkpoints go too."""
    state = guard_state.load(name)
    if state is None:
        raise NotFoundError(f"container {name} was never guarded", hint="see `cryoci guard status`")
    alive = state.alive
    if alive:
        os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    while state.alive:
        if time.monotonic() > deadline:
            raise ConflictError(
                f"the guard of {name} (process {state.pid}) did not end within {_END_SECONDS:g} s",
                hint="it may be in the middle of a checkpoint or restore; try again",
            )
        time.sleep(0.05)
    if remove:
        state = guard_state.load(name) or state
        place = guard_places.place(name, state.to, registry)
        for kept in state.kept:
            if problem := guard_places.try_drop(place, kept):
                raise ConflictError(
                    f"checkpoint {kept.number} of {name} could not be removed: {problem}",
                    hint=f"remove {kept.where} yourself",
                )
        guard_state.forget(state)
    return alive


def _status(container: Container) -> str:
    try:
        return container.status
    except NotFoundError:
        return "gone"


def _check(container: Container, *, restores: bool, rootfs: str) -> None:
    """Refuse what would fight with the guard. Raises ConflictError, UsageError."""
    if container.engine == "podman" and rootfs == "none":
        raise UsageError(
            f"container {container.name} is podman's, whose changed files go with its checkpoints",
            hint="--rootfs none is for bare containers, whose bundle stays",
        )
    if container.engine != "podman" or not restores:
        return
    if container.auto_remove:
        raise ConflictError(
            f"container {container.name} is removed by podman when it ends (--rm), so nobody could tell a crash",
            hint="start it without --rm",
        )
    policy = podman.restart_policy(container)
    if policy != "no":
        raise ConflictError(
            f"podman restarts container {container.name} from scratch when it crashes (--restart={policy}), and "
            "the guard would restore it: only one of them can",
            hint=f"podman update --restart=no {container.name}, or guard it with --on-failure=none",
        )
