# SPDX-License-Identifier: Apache-2.0
"""`cryoci top`: containers with what they hold, and when they were and will be checkpointed by their guards."""

from __future__ import annotations

import time
from dataclasses import dataclass

from cryoci.shim.engines import overview
from cryoci.uses import guard_state


@dataclass(frozen=True)
class Line:
    """One container; bytes on GPUs and in host memory; seconds since the newest checkpoint, until the next one."""

    name: str
    state: str
    engine: str
    vram: int
    host: int
    gpus: tuple[str, ...]
    guard: str
    since: float | None
    until: float | None
    crashes: int


def lines() -> list[Line]:
    """All containers that run or are parked, and those that a guard has lost. Raises what the engines raise."""
    guards = {state.name: state for state in guard_state.every_state()}
    now = time.time()
    found = []
    for row in overview.rows():
        guard = guards.pop(row.name, None)
        found.append(_line(row.name, row.state, row.engine, row.vram, row.host, tuple(row.gpus), guard, now))
    lost = [guard for guard in guards.values() if guard.phase in ("restoring", "lost")]
    return found + [_line(guard.name, "gone", guard.engine, 0, 0, (), guard, now) for guard in lost]


def _line(
    name: str,
    state: str,
    engine: str,
    vram: int,
    host: int,
    gpus: tuple[str, ...],
    guard: guard_state.State | None,
    now: float,
) -> Line:
    if guard is None:
        return Line(name, state, engine, vram, host, gpus, "", None, None, 0)
    newest = max((kept.taken for kept in guard.kept), default=None)
    watching = guard.alive and guard.phase == "watching"
    return Line(
        name,
        state,
        engine,
        vram,
        host,
        gpus,
        guard.phase if guard.alive or guard.phase not in ("watching", "restoring") else "not running",
        None if newest is None else now - newest,
        max(0.0, newest + guard.every - now) if watching and newest is not None else None,
        len(guard.recoveries),
    )
