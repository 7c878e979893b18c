# SPDX-License-Identifier: Apache-2.0
"""Whose turn is over, when somebody else is wanted in a share; and how one leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryoci.uses.share_member import Member

_MOST = 60.0  # seconds that one who leaves waits for its successor
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


class Leaving:
    """One on its way out: `lulled` when its application has prepared itself; `go` tells it to make room."""

    def __init__(self) -> None:
        self.lulled, self.go = threading.Event(), threading.Event()

    def prepared(self) -> None:
        """Tell that it is lulled, and wait until it is to go."""
        self.lulled.set()
        self.go.wait(_MOST)


def all_lulled(leaving: Sequence[Leaving]) -> None:
    """Wait until the applications of all who leave have prepared themselves, or do not leave."""
    for one in leaving:
        one.lulled.wait()
