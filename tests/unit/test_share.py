# SPDX-License-Identifier: Apache-2.0
"""Who is parked for whom; and a swap that fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConflictError, SpaceError, UsageError
from cryoci.shim import app
from cryoci.shim.engines import gpu
from cryoci.shim.engines.container import Container
from cryoci.uses import share, share_turns, swap
from cryoci.uses.share_member import Member, parse

AGO = 100.0  # seconds: long enough for everything


def members(*busy: str) -> list[Member]:
    """a, b and c: a and b run and were brought in long ago, a was used last; c is wanted."""
    found = parse(("a=9001:80", "b=9002:80", "c=9003:80"))
    now = time.monotonic()
    for member in found[:2]:
        member.active, member.since, member.used = True, now - AGO, now - (10 if member.name == "a" else 20)
        if member.name in busy:
            member.waiting.add(1)
    found[2].wanted = now
    return found


def victim(found: list[Member], **options: Any) -> str | None:
    chosen = share_turns.victim(found, found[2], share_turns.Options(active=2, **options))
    return chosen.name if chosen else None


def test_the_least_recently_used_goes() -> None:
    assert victim(members()) == "b"
    assert victim(members("b")) == "a"  # an answer is owed by the other


def test_the_last_in_line_goes() -> None:
    found = members()
    found[1].used = time.monotonic()
    assert victim(found, policy="priority") == "b"
    found[1].waiting.add(1)
    assert victim(found, policy="priority") == "a"


def test_who_has_run_longest_goes() -> None:
    found = members()
    found[0].since -= 1  # a: used last all the same
    assert victim(found, policy="round-robin") == "a"
    found[0].waiting.add(1)
    assert victim(found, policy="round-robin") == "b"


def test_nobody_is_parked_in_an_answer_before_patience_is_over() -> None:
    found = members("a", "b")
    assert victim(found, patience=5.0) is None
    found[2].wanted = time.monotonic() - 6
    assert victim(found, patience=5.0) == "b"


def test_one_in_use_keeps_its_place_for_a_while() -> None:
    found = members()
    now = time.monotonic()
    for member in found[:2]:
        member.since, member.used = now - 1, now
    assert victim(found, patience=5.0) is None
    found[0].since = now - 6
    assert victim(found, patience=5.0) == "a"
    found[0].since = now  # just brought in: those who waited for it are to get their bytes through
    found[0].used = now - AGO
    assert victim(found, patience=5.0) is None


@pytest.mark.parametrize(
    "words",
    [(), ("web",), ("web=0:80",), ("web=1:99999",), ("a=1:1", "a=2:1"), ("a=1:1", "b=1:2"), ("=1:1",)],
)
def test_words_that_are_no_members(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        parse(words)


def test_members_listen_where_they_are_told() -> None:
    one, two, three = parse(("a=1:2", "b=0.0.0.0:3:4", "c=[::1]:5:6"))
    assert [(m.host, m.port, m.inner) for m in (one, two, three)] == [
        ("127.0.0.1", 1, 2), ("0.0.0.0", 3, 4), ("::1", 5, 6),
    ]  # fmt: skip


def container(name: str) -> Container:
    return Container("runc", name, name, "/runc", None, Path("/b"), Path("/b/r"), None, {})


def test_a_swap_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def park(one: Container, hooks: app.Choice) -> gpu.Parked:
        assert not hooks.off
        done.append(f"park {one.name}")
        return gpu.Parked(one.name, "parked", 0, True)

    def unpark(one: Container, *, hooks: bool = True) -> gpu.Parked:
        done.append(f"unpark {one.name}")
        if one.name == "large":
            raise SpaceError("its GPU has too little memory")
        return gpu.Parked(one.name, "running", 0, True)

    monkeypatch.setattr(gpu, "park", park)
    monkeypatch.setattr(gpu, "unpark", unpark)
    monkeypatch.setattr(gpu, "unpark_or_stay", unpark)
    with pytest.raises(SpaceError):
        swap.swap(container("small"), container("large"))
    assert done == ["park small", "unpark large", "unpark small"]
    with pytest.raises(ConflictError):
        swap.swap(container("small"), container("small"))


class Slow(Member):
    """Goes out in two steps, its application's and the driver's; comes in when there is `room`."""

    room = True

    def __init__(self, name: str, said: list[str]) -> None:
        super().__init__(name, "", 0, 0)
        self.said = said
        self.asked, self.driver, self.fails = threading.Event(), threading.Event(), False

    def park(self, lulled: Callable[[], None] = lambda: None) -> None:
        assert self.asked.wait(5)
        self.said.append(f"{self.name} prepared")
        lulled()
        self.said.append(f"{self.name} goes")
        assert self.driver.wait(5)
        if self.fails:
            raise ConflictError("it is traced")
        self.said.append(f"{self.name} out")
        Slow.room = True

    def unpark(self, others: Callable[[], None] | None = None) -> None:
        self.said.append(f"{self.name} {'comes' if Slow.room else 'finds no room'}")
        if not Slow.room:
            raise SpaceError("its GPU has too little memory")
        if others is not None:
            others()
        self.said.append(f"{self.name} in")


def changing_places(act: Callable[[share.Share, Slow, Slow], Coroutine[None, None, None]]) -> list[str]:
    """`act` on a share in which the first runs and the second is wanted; returns what happened."""
    said: list[str] = []
    one, two = Slow("one", said), Slow("two", said)
    one.active, two.wanted = True, time.monotonic()
    asyncio.run(act(share.Share([one, two], share_turns.Options(), said.append), one, two))
    return [line for line in said if " runs: " not in line and " is parked, " not in line]


def test_one_comes_in_before_the_other_goes_out() -> None:
    async def act(daemon: share.Share, one: Slow, two: Slow) -> None:
        coming = asyncio.create_task(daemon._bring_in(two))
        await asyncio.sleep(0.05)
        assert not two.active and one.said == ["two comes"]  # the other's application is still at it
        one.asked.set()
        assert await coming and [m.name for m in daemon.members if m.active] == ["two"]
        one.driver.set()
        await asyncio.wait(daemon._leaving)

    Slow.room = True
    assert changing_places(act) == ["two comes", "one prepared", "two in", "one goes", "one out"]


def test_one_comes_in_when_the_other_has_made_room() -> None:
    async def act(daemon: share.Share, one: Slow, two: Slow) -> None:
        asyncio.get_running_loop().call_later(0.1, one.asked.set)
        one.driver.set()
        assert await daemon._bring_in(two) and two.active

    Slow.room = False
    assert changing_places(act) == [
        "two finds no room",
        "one prepared",
        "one goes",
        "one out",
        "two comes",
        "two in",
    ]


def test_when_the_other_does_not_leave_one_of_them_goes_soon() -> None:
    async def act(daemon: share.Share, one: Slow, two: Slow) -> None:
        for each in (one, two):
            each.asked.set()
        one.fails = True
        assert await daemon._bring_in(two)
        one.driver.set()
        two.driver.set()
        await asyncio.wait(daemon._leaving)
        assert all(m.active for m in daemon.members)  # one more than may
        two.used = one.used - 1
        await daemon._make_even()
        assert [m.name for m in daemon.members if m.active] == ["one"]

    Slow.room = True
    assert changing_places(act)[-3:] == ["two prepared", "two goes", "two out"]
