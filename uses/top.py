# SPDX-License-Identifier: Apache-2.0
"""`cryoci top`: containers with what they hold, and what this node's daemons know of them.

A guard knows when it was and will be checkpointed, `cryoci share` where a member is, `cryoci idle` and `share` how
long nobody has used it, and which of them has parked it.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from cryoci.shim.engines import overview
from cryoci.uses import guard_state, idle_state, share_shelf, share_tiers
from cryoci.uses.guard_state import State as Guard
from cryoci.uses.idle_state import State as Watched
from cryoci.uses.share_shelf import Stored
from cryoci.uses.share_tiers import State as Shared


@dataclass(frozen=True)
class Line:
    """One container; bytes on GPUs and in host memory; seconds since the newest checkpoint, until the next one.

    `tier` is a member's of `cryoci share`, `unused` seconds since it was used last and `parked_by` idle or share, as
    far as they know. `note` is what one of the daemons has to complain about, or where it is stored.
    """

    name: str
    state: str
    engine: str
    vram: int = 0
    host: int = 0
    gpus: tuple[str, ...] = ()
    tier: str = ""
    unused: float | None = None
    parked_by: str = ""
    guard: str = ""
    since: float | None = None
    until: float | None = None
    crashes: int = 0
    note: str = ""


def lines() -> list[Line]:
    """All containers that run or are parked, members that are stored, and those that a guard has lost.

    Raises what the engines raise.
    """
    guards = {state.name: state for state in guard_state.every_state()}
    watched = {state.name: state for state in idle_state.every_state() if state.alive}
    shared = {state.name: state for state in share_tiers.every_state()}
    stored = {made.name: made for made in share_shelf.every()}
    now = time.time()
    found = []
    for row in overview.rows():
        bare = Line(row.name, row.state, row.engine, row.vram, row.host, tuple(row.gpus))
        found.append(_line(bare, guards.get(row.name), watched.get(row.name), shared.get(row.name), now))
    here = {line.name for line in found}
    for name in sorted({*stored, *guards} - here):
        made, guard = stored.get(name), guards.get(name)
        if made is not None:
            found.append(_line(_stored(made, now), guard, None, shared.get(name), now))
        elif guard is not None and guard.phase in ("restoring", "lost"):
            found.append(_line(Line(name, "gone", guard.engine), guard, None, None, now))
    return found


def _stored(made: Stored, now: float) -> Line:
    return Line(made.name, "stored", made.engine, tier=made.tier, since=now - made.taken, note=made.where)


def _line(
    line: Line, guard: Guard | None, watched: Watched | None, shared: Shared | None, now: float
) -> Line:
    """`line` with what the daemons know."""
    more: dict[str, object] = {}
    if shared is not None:
        more = {
            "tier": shared.tier,
            "unused": max(0.0, now - shared.used),
            "note": shared.problem or line.note,
        }
        if shared.tier in ("running", "host"):  # which of the two, its daemon may write a moment later
            more["tier"] = "host" if line.state == "parked" else "running"
        if line.state == "parked" and more["tier"] == "host":
            more["parked_by"] = "share"
    if watched is not None:
        more |= {"unused": max(0.0, now - watched.used), "note": watched.problem or more.get("note", "")}
        if line.state == "parked" and watched.rested:
            more["parked_by"] = "idle"
    if guard is not None:
        newest = max((kept.taken for kept in guard.kept), default=None)
        watching = guard.alive and guard.phase == "watching"
        ended = not guard.alive and guard.phase in ("watching", "restoring")
        more |= {"guard": "not running" if ended else guard.phase, "crashes": len(guard.recoveries)}
        if newest is not None:
            more["since"] = now - newest
            more["until"] = max(0.0, newest + guard.every - now) if watching else None
    return dataclasses.replace(line, **more)  # type: ignore[arg-type]
