# SPDX-License-Identifier: Apache-2.0
"""`cryoci idle`: containers that nobody uses are parked, and brought back by who comes for them.

    look (GPU, connections, Jupyter, CPU) -> nothing for `after` -> park ... a client at its port -> unpark -> look

The clients' side is that of `cryoci share`, with a place for everybody. When it cannot be told whether a container is
used, it is not parked.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryoci.errors import ConflictError, CryociError, UsageError
from cryoci.shim.engines import processes
from cryoci.uses import idle_probe, idle_state, share, share_turns
from cryoci.uses.guard_state import start_time
from cryoci.uses.idle_probe import Jupyter, Watch
from cryoci.uses.idle_state import State
from cryoci.uses.metrics import Metric
from cryoci.uses.share_member import Member


@dataclass(frozen=True)
class Options:
    """Times in seconds: parked when not used for `after`; looked at `every`."""

    after: float = 900.0
    every: float = 5.0


class Idle:
    """The daemon; `say` gets one line about each thing that happened. Members without a port have no clients' side."""

    def __init__(
        self,
        members: Sequence[Member],
        watches: Mapping[str, Watch],
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._say = say
        self._watches = watches
        self._share = share.Share(
            members, share_turns.Options(active=len(members), idle=options.after), say, name="idle"
        )
        self._states: dict[str, State] = {}
        self._parks: dict[str, int] = {}
        self._was: dict[str, bool] = {}

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; containers stay as they are then. Raises ConflictError, NotFoundError."""
        place = idle_state.directory()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as locks:
            for member in self._share.members:
                known = idle_state.load(member.name)
                if not locks.enter_context(processes.lock(place / f"{member.name}.lock")):
                    by = f", by process {known.pid}" if known is not None and known.alive else ""
                    raise ConflictError(
                        f"container {member.name} is watched already{by}", hint="see `cryoci idle status`"
                    )
            await self._share.run(beside=self._look_on)

    async def _look_on(self) -> None:
        """Look at all members again and again."""
        for member in self._share.members:
            self._begin(member)
        since = time.time()
        while True:
            at = time.time()
            seen = await asyncio.to_thread(idle_probe.gpus, since)
            since = at
            for member in self._share.members:
                await self._look(member, seen)
            await asyncio.sleep(min(self._options.every, self._options.after / 3))

    def _begin(self, member: Member) -> None:
        """Go on from what the daemon before this one knew of the same process."""
        of = (member.pid, member.started)
        fresh = State(
            member.name, os.getpid(), start_time(os.getpid()), of, self._options.after, used=time.time()
        )
        fresh.at = f"{member.host}:{member.port}" if member.port else ""
        known = idle_state.load(member.name)
        if known is not None and known.of == of:
            fresh.used, fresh.why, fresh.parks = min(known.used, time.time()), known.why, known.parks
            member.used = member.since = time.monotonic() - (time.time() - fresh.used)
            member.rested = known.rested and not member.active
        self._states[member.name] = fresh
        self._was[member.name] = member.active

    async def _look(self, member: Member, seen: idle_probe.Gpus) -> None:
        state = self._states[member.name]
        why, problem = "", ""
        if member.active and not member.gone:
            try:
                why = await asyncio.to_thread(self._watches[member.name].look, member.pid, seen)
            except (CryociError, OSError) as e:
                problem = e.message if isinstance(e, CryociError) else str(e)
            if why or problem:
                member.touch()
        if problem and problem != state.problem:
            self._say(f"{member.name} is not parked while nobody can tell if it is used: {problem}")
        if self._was[member.name] and not member.active:
            state.parks += 1
        self._was[member.name] = member.active
        state.of, state.problem, state.why = (member.pid, member.started), problem, why or state.why
        state.rested = member.rested
        state.state = "gone" if member.gone else "running" if member.active else "parked"
        state.used = time.time() - (time.monotonic() - max(member.used, member.since))
        state.save()

    def metrics(self) -> list[Metric]:
        """Numbers for Prometheus."""

        def each(
            name: str, kind: Literal["gauge", "counter"], text: str, value: Callable[[State], float]
        ) -> Metric:
            states = list(self._states.values())
            samples = [({"member": state.name}, value(state)) for state in states]
            return Metric(f"cryoci_idle_{name}", kind, text, samples)

        now = time.time()
        return [
            *self._share.metrics(),
            each("seconds", "gauge", "Time since it was used last.", lambda state: now - state.used),
            each("parks_total", "counter", "Times that it was parked.", lambda state: state.parks),
            each("unknown", "gauge", "1 while nobody can tell if it is used.", lambda s: float(bool(s.problem))),
        ]  # fmt: skip


def servers(names: Sequence[str], ports: Sequence[str], tokens: Sequence[str]) -> dict[str, Jupyter]:
    """Jupyter servers of `NAME=PORT` and `NAME=FILE`, which can be read by now. Raises UsageError, ConfigError."""
    found: dict[str, Jupyter] = {}
    files = dict(_pair(word, names, "--jupyter-token") for word in tokens)
    for name, text in (_pair(word, names, "--jupyter") for word in ports):
        if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
            raise UsageError(f"--jupyter {name}={text[:80]}: that is no port", hint="write NAME=8888")
        file = files.pop(name, None)
        found[name] = Jupyter(int(text), None if file is None else Path(file))
        if file is not None:
            idle_probe.read_token(Path(file))
    if files:
        raise UsageError(f"--jupyter-token {min(files)}=...: there is no --jupyter for it")
    return found


def _pair(word: str, names: Sequence[str], option: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    if name not in names or not value:
        raise UsageError(
            f"{option} {word[:80]!r} names no container that is watched", hint=f"one of {', '.join(names)}"
        )
    return name, value
