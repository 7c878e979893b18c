# SPDX-License-Identifier: Apache-2.0
"""Whose turn is over, when somebody else is wanted in a share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryoci.uses.share_member import Member

_GRACE = 0.2  # seconds in which those who waited for a member can get their bytes to it


@dataclass(frozen=True)
class Options:
    """`active` members run at most. Times in seconds.

    One that is in use keeps its place from others for `patience`; one that nobody has used for `idle` is parked
    anyway (None: never).
    """

    active: int = 1
    policy: Literal["lru", "priority", "round-robin"] = "lru"
    idle: float | None = None
    patience: float = 2.0


def victim(members: Sequence[Member], member: Member, options: Options) -> Member | None:
    """Who is parked for `member`; None: wait.

    One that is used keeps its place for as long as `patience`, for a swap costs more than an answer; then it
    is parked between two answers, or in the middle of one when `member` has waited for as long too.
    """
    now, patience = time.monotonic(), options.patience
    patient = now - member.wanted < patience
    free = []
    for one in members:
        if not one.active or one is member or now - one.since < _GRACE:
            continue
        had_its_time = now - one.since >= patience
        if (had_its_time and not patient) if one.busy else (had_its_time or now - one.used >= _GRACE):
            free.append(one)
    if options.policy == "priority":
        return max(free, key=lambda one: (not one.busy, one.rank), default=None)
    if options.policy == "round-robin":  # who has had the place longest, however much it is used
        return min(free, key=lambda one: (one.busy, one.since), default=None)
    return min(free, key=lambda one: (one.busy, one.used), default=None)
