# SPDX-License-Identifier: Apache-2.0
"""Who leaves host memory, where to, and what a share finds when it starts again."""

from __future__ import annotations

import asyncio
import fcntl
import functools
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConfigError, ConflictError, NotFoundError, SpaceError, UsageError
from cryoci.ociimage.reference import DirectoryRef, RegistryRef
from cryoci.shim import engines, netns
from cryoci.shim.engines import gpu, processes
from cryoci.shim.engines.container import Container
from cryoci.shim.gpu import preflight
from cryoci.uses import share_shelf, share_tiers, top
from cryoci.uses.guard_state import start_time
from cryoci.uses.share_member import Member, parse
from cryoci.uses.share_shelf import Shelf, Stored
from cryoci.uses.share_tiers import Limits, Tiers

GIB = 1 << 30
ME = (os.getpid(), start_time(os.getpid()))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_LIB", str(tmp_path / "lib"))
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))


class Takes(Shelf):
    """A shelf that only notes who was put on it; it refuses `full`."""

    def __init__(self, *full: str) -> None:
        super().__init__(None, print)
        self.full = full
        self.took: list[str] = []

    def put(self, container: Container) -> Stored:
        if container.name in self.full:
            raise SpaceError(f"no room for {container.name}")
        self.took.append(container.name)
        return stored(container.name)


def stored(name: str, **more: Any) -> Stored:
    return Stored(name, "runc", "/runc", name, (1, 2), "", where=f"/srv/{name}", **more)


def container(name: str, status: str = "running") -> Container:
    class Known(Container):
        def state(self) -> dict[str, Any]:
            return {"status": status, "pid": os.getpid()}

    return Known("runc", name, name, "/runc", None, Path("/b"), Path("/b/r"), None, {})


def tiers(limits: Limits, shelf: Shelf, *, policy: str = "lru") -> tuple[list[Member], Tiers]:
    """a runs; b, c and d are parked and were used in this order; each takes 1 GiB."""
    members = parse(("a=9001:1", "b=9002:1", "c=9003:1", "d=9004:1"))
    for n, member in enumerate(members):
        member.pid, member.started = ME
        member.known, member.shelf = container(member.name), shelf
        member.used = member.since = 100.0 + n
    members[0].active = True
    return members, Tiers(members, shelf, limits, policy, print)


@pytest.fixture(autouse=True)
def all_are_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_parked", lambda one: True)


@pytest.fixture
def each_holds_a_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "private_memory", lambda pid: GIB)


@pytest.mark.usefixtures("each_holds_a_gib")
@pytest.mark.parametrize(("policy", "goes"), [("lru", "b"), ("priority", "d"), ("round-robin", "b")])
def test_the_least_useful_one_leaves(policy: str, goes: str) -> None:
    shelf = Takes()
    members, made = tiers(Limits(host=2 * GIB, stores=True), shelf, policy=policy)
    asyncio.run(made._make_room(0))
    assert shelf.took == [goes]
    assert made.parked() == 2 * GIB and made.tier(members["abcd".index(goes)]) == "disk"


@pytest.mark.usefixtures("each_holds_a_gib")
def test_who_is_needed_stays() -> None:
    """Wanted, owed to, operated on, or refused a while ago; one with clients goes last, and loses them."""
    shelf = Takes()
    members, made = tiers(Limits(host=0, stores=True), shelf)
    closed: list[str] = []
    members[1].connections.add(1)
    members[1].closers[1] = lambda: closed.append("b")
    members[2].wanted = 1.0
    asyncio.run(made._make_room(0))
    assert shelf.took == ["d", "b"] and closed == ["b"]
    members[2].wanted, members[2].moving = 0.0, 1
    asyncio.run(made._make_room(0))
    members[2].moving, members[2].kept = 0, time.monotonic() + 60
    asyncio.run(made._make_room(0))
    assert shelf.took == ["d", "b"]


@pytest.mark.usefixtures("each_holds_a_gib")
def test_who_cannot_be_stored_keeps_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_parked", lambda one: one.name != "b")
    shelf = Takes()
    members, made = tiers(Limits(host=0, stores=True), shelf)
    closed: list[str] = []
    for member in members[1:3]:
        member.closers[1] = functools.partial(closed.append, member.name)
    asyncio.run(made._make_room(0))
    assert closed == ["c"] and shelf.took == ["c", "d"]
    members[1].known, members[1].kept = container("called"), 0.0
    asyncio.run(made._make_room(0))
    assert closed == ["c"] and members[1].unstored == "b is called called"


@pytest.mark.usefixtures("each_holds_a_gib")
def test_one_that_cannot_be_stored_stays_and_says_why() -> None:
    shelf = Takes("b")
    members, made = tiers(Limits(host=2 * GIB, stores=True), shelf)
    asyncio.run(made._make_room(0))
    assert shelf.took == ["c"] and made.tier(members[1]) == "host"
    assert members[1].unstored == "no room for b" and members[1].kept > time.monotonic()
    numbers = {(m.name, *sample[0].values()): sample[1] for m in made.metrics() for sample in m.samples}
    assert numbers["cryoci_share_tier_moves_total", "failed"] == 1
    assert numbers["cryoci_share_members", "host"] == 2 and numbers["cryoci_share_members", "disk"] == 1


def test_memory_of_the_node_counts_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10 * GIB]
    monkeypatch.setattr(preflight, "available_memory", lambda: free[0])
    shelf = Takes()
    _, made = tiers(Limits(reserve=8 * GIB, stores=True), shelf)
    asyncio.run(made._make_room(GIB))
    assert shelf.took == []
    free[0] = 8 * GIB
    asyncio.run(made._make_room(GIB))  # nobody's leaving helps here
    assert shelf.took == ["b", "c", "d"]
    _, other = tiers(Limits(reserve=8 * GIB), Takes())
    asyncio.run(other._make_room(9 * GIB))  # not asked for


def test_limits_as_people_write_them() -> None:
    assert Limits.parse("64G", None, stores=False).host == 64 * GIB
    assert Limits.parse("0", None, stores=False).stores
    assert Limits.parse(None, "2G", stores=False) == Limits(None, 2 * GIB, True)
    default = Limits.parse(None, None, stores=False)
    assert not default.stores and default.reserve > 0
    for words in (("1", "2"), ("much", None)):
        with pytest.raises((UsageError, ConfigError)):
            Limits.parse(*words, stores=True)


def test_places_as_people_write_them() -> None:
    assert share_shelf.goal(None, None) is None
    assert share_shelf.goal("parked", None) == DirectoryRef(Path("parked"))
    assert share_shelf.goal(None, "h.example/parked") == RegistryRef("h.example", "parked")
    for disk, registry in (("a", "h.example/b"), (None, "nowhere"), (None, "h.example/a:tag")):
        with pytest.raises(UsageError):
            share_shelf.goal(disk, registry)


class Drops(Shelf):
    """A shelf whose images are only noted when they go."""

    def __init__(self) -> None:
        self.said: list[str] = []
        super().__init__(None, self.said.append)
        self.dropped: list[str] = []

    def _drop(self, made: Stored) -> None:
        self.dropped.append(made.where)


@pytest.mark.parametrize(
    ("status", "of", "restoring", "dropped"),
    [
        ("gone", (1, 2), False, False),  # it is stored
        ("exited", (1, 2), False, False),  # podman keeps it
        ("running", ME, False, True),  # the share was killed before it ended
        ("paused", ME, False, True),
        ("running", (1, 2), True, True),  # the share was killed when it had been restored
        ("running", (1, 2), False, False),  # somebody else has started one: what is stored is kept
    ],
)
def test_what_a_share_finds_when_it_starts_again(
    monkeypatch: pytest.MonkeyPatch, status: str, of: tuple[int, int], restoring: bool, dropped: bool
) -> None:
    def find(name: str) -> Container:
        if status == "gone":
            raise NotFoundError("no such container")
        return container(name, status)

    monkeypatch.setattr(engines, "find", find)
    raised: list[int] = []
    monkeypatch.setattr(netns, "raise_loopback", raised.append)
    shelf = Drops()
    made = stored("a", restoring=restoring)
    made.of = of
    made.save()
    found = shelf.settle("a")
    stays = status in ("gone", "exited")
    assert (found == made) if stays else (found is None and share_shelf.every() == [])
    assert shelf.dropped == (["/srv/a"] if dropped else [])
    assert bool(shelf.said) == (not stays and not dropped)
    assert raised == ([os.getpid()] if restoring else [])
    assert shelf.settle("b") is None


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2}', '{"version": 1, "of": [1, 2]}', "[1]"])
def test_a_note_that_cannot_be_read_is_no_reason_to_lose_a_member(tmp_path: Path, text: str) -> None:
    stored("a").save()
    (tmp_path / "lib" / "share" / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="what is stored of a cannot be read"):
        Shelf(None, print).settle("a")
    assert share_shelf.every() == []


@pytest.mark.parametrize("noted", [False, True])
def test_what_a_killed_daemon_left_half_made_goes(tmp_path: Path, noted: bool) -> None:
    half, made = tmp_path / "a-1234", stored("a")
    half.mkdir()
    with pytest.raises(KeyboardInterrupt), share_shelf._swept("a", half):
        text = (tmp_path / "lib" / "share" / ".a.making").read_text()
        raise KeyboardInterrupt
    assert not (tmp_path / "lib" / "share" / ".a.making").exists()
    (tmp_path / "lib" / "share" / ".a.making").write_text(text)  # as after a kill
    if noted:  # it was killed when it was done
        made.where = str(half)
        made.save()
    Drops().settle("b")
    assert half.is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "find", lambda name: container(name, "stopped"))
        assert Drops().settle("a") == (made if noted else None)
    assert half.is_dir() == noted and not (tmp_path / "lib" / "share" / ".a.making").exists()


def test_one_that_fails_to_come_back_stays_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = stored("a", need=1)
    made.where = str(tmp_path / "nothing")
    made.save()
    monkeypatch.setattr(preflight, "available_memory", lambda: 0)
    with pytest.raises(ConflictError, match="of host memory"):
        Shelf(None, print).bring(made)
    monkeypatch.setattr(preflight, "available_memory", lambda: GIB)
    with pytest.raises(Exception, match="nothing"):
        Shelf(None, print).bring(made)
    assert share_shelf.every() == [made] and not made.restoring


def test_only_who_would_come_back_as_it_was_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_parked", lambda one: False)
    with pytest.raises(ConflictError, match="is not parked"):
        Shelf(None, print).put(container("a"))
    monkeypatch.setattr(gpu, "is_parked", lambda one: True)
    restarted = {"dumps": {"config.dump": {"restart_policy": "always"}}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"auto_remove": True}, "--rm"),
        (restarted, "--restart=always"),
    ]
    for more, why in cases:
        one = Container("podman", "a", "a", "/runc", None, Path("/b"), Path("/b/r"), None, {}, **more)
        with pytest.raises(ConflictError, match=why):
            Shelf(None, print).put(one)


def test_two_daemons_do_not_share_a_member() -> None:
    members, made = tiers(Limits(), Takes())
    with made.held():
        made._publish()
        assert [state.tier for state in share_tiers.every_state()] == ["running", "host", "host", "host"]
        with pytest.raises(ConflictError, match="is shared already, by process"), made.held():
            pass
    assert share_tiers.every_state() == []
    members[0].name = "../a"
    with pytest.raises(UsageError), made.held():
        pass


def test_top_shows_what_daemons_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from cryoci.shim.engines import overview
    from cryoci.uses import idle_state

    rows = [
        overview.Row("b", "1", "runc", "parked", 1, 0, GIB, ()),
        overview.Row("lab", "2", "podman", "parked", 2, 0, GIB, ()),
    ]
    monkeypatch.setattr(overview, "rows", lambda: rows)
    stored("c", taken=time.time() - 60).save()
    now = time.time()
    idle_state.State("lab", *ME, (2, 2), 900.0, state="parked", used=now - 1000, rested=True).save()
    members, made = tiers(Limits(), Takes())
    members[2].stored = stored("c")
    members[1].unstored = "no room"
    with made.held():
        made._publish()
        b, lab, c = top.lines()
    assert (b.tier, b.parked_by, b.note) == ("host", "share", "no room")
    assert (lab.tier, lab.parked_by) == ("", "idle") and lab.unused and 999 < lab.unused < 1100
    assert (c.state, c.tier, c.note) == ("stored", "disk", "/srv/c") and c.since and 59 < c.since < 100
    assert json.dumps([line.__dict__ for line in (b, lab, c)])


_LIVE = """
from cryoci.cli import top
from cryoci.uses import top as lines
seen = [0]
def twice():
    seen[0] += 1
    if seen[0] > 2:
        raise KeyboardInterrupt
    return [lines.Line(f"model{seen[0]}", "parked", "runc", parked_by="idle", tier="host", unused=61.0)]
lines.lines = twice
top.command(["--every", "10ms"], standalone_mode=False)
"""


@pytest.mark.parametrize(("term", "shown"), [("xterm", ["model1", "model2"]), ("dumb", ["model1"])])
def test_a_table_that_is_drawn_anew(term: str, shown: list[str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 200, 0, 0))
    environment = {**os.environ, "TERM": term}
    argv = [sys.executable, "-c", _LIVE]
    child = subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # EIO: nobody writes any more
        while data := os.read(ours, 1 << 16):
            said += data
    os.close(ours)
    assert child.wait(30) == 0
    assert [name for name in ("model1", "model2") if name.encode() in said] == shown
    assert b"idle" in said and b"61 s" in said and b"CRASHES" not in said
