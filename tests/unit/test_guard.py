# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a guard takes after a crash, how often, and after which pauses."""

from __future__ import annotations

import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cryoci.cli.guard import command
from cryoci.errors import CryociError, ImageError, RegistryError, RestoreError
from cryoci.ociimage.transport import RegistryOptions
from cryoci.uses import guard, guard_end, guard_places, guard_state
from cryoci.uses.guard_end import End
from cryoci.uses.guard_state import Kept, Recovery

NEWEST, OLDER, OLDEST = 3, 2, 1


class Node:
    """A node on which a checkpoint cannot be restored for the reasons in `errors`, one after the other, then can."""

    def __init__(self) -> None:
        self.errors: dict[int, list[CryociError]] = {}
        self.tried: list[int] = []
        self.pauses: list[float] = []

    def take(self, *_: object) -> Kept:
        raise AssertionError

    def has(self, kept: Kept) -> bool:
        return True

    @contextmanager
    def open(self, kept: Kept) -> Iterator[Path]:
        self.tried.append(kept.number)
        if self.errors.get(kept.number):
            raise self.errors[kept.number].pop(0)
        yield Path(kept.where)

    def drop(self, kept: Kept) -> None:
        pass


class Restored:
    warnings = ()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    import posix

    for name in ("CRYOCI_LIB", "CRYOCI_RUN"):
        monkeypatch.setitem(posix.environ, name.encode(), str(tmp_path / name).encode())
    made = Node()
    monkeypatch.setattr(guard_places, "place", lambda *_: made)
    monkeypatch.setattr(guard, "restore", lambda directory, options: Restored())
    monkeypatch.setattr(time, "sleep", made.pauses.append)
    monkeypatch.setattr(guard.Guard, "_find", lambda self: None)
    return made


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def web(node: Node, said: list[str]) -> guard.Guard:
    """A guard with three checkpoints."""
    made = guard.Guard("web", guard.Options(stable=60), said.append)
    made.state.kept = [
        Kept(number, f"/{number}", time.time() - 100 + number, 0.1, 1) for number in (OLDEST, OLDER, NEWEST)
    ]
    return made


def suspects(made: guard.Guard) -> list[int]:
    return [kept.number for kept in made.state.kept if kept.suspect]


def test_the_newest_and_at_once(node: Node, web: guard.Guard) -> None:
    web._bring_back(None)
    assert (node.tried, node.pauses, suspects(web)) == ([NEWEST], [0.0], [])
    assert web.state.recoveries[-1].number == NEWEST
    assert 96 < web.state.recoveries[-1].lost < 98  # without the pause


def test_a_broken_one_is_tried_once_then_the_older_one(node: Node, web: guard.Guard) -> None:
    for wrong in (RestoreError("CRIU failed"), ImageError("a digest is wrong")):
        node.errors = {NEWEST: [wrong]}
        node.tried.clear()
        web._bring_back(None)
        assert node.tried == [NEWEST, OLDER] and suspects(web) == [NEWEST]
        web.state.kept[-1].suspect = False
        web.state.recoveries.clear()
    known = guard_state.load("web")
    assert known is not None and known.kept[-1].suspect  # on disk before the older one is tried


def test_what_the_registry_refuses_is_tried_again_after_longer_and_longer(
    node: Node, web: guard.Guard
) -> None:
    """It says nothing against the checkpoint, which is no suspect; then the older one is tried."""
    node.errors = {NEWEST: [RegistryError("no answer")] * 3}
    web._bring_back(None)
    assert node.tried == [NEWEST] * 3 + [OLDER]
    assert node.pauses == [0.0, 1.0, 2.0, 4.0] and suspects(web) == []


def test_one_that_crashes_soon_after_its_restore_is_never_next(node: Node, web: guard.Guard) -> None:
    web._bring_back(None)
    web._bring_back(None)
    assert node.tried == [NEWEST, OLDER] and suspects(web) == [NEWEST]
    assert node.pauses == [0.0, 1.0]
    last = web.state.recoveries[-1]  # and much later, what had held so long is good
    web.state.recoveries[-1] = Recovery(last.at - 1000, last.number, 0, 0)
    web._bring_back(None)
    assert node.tried == [NEWEST, OLDER, OLDER] and suspects(web) == [NEWEST]


def test_pauses_end_at_a_minute_and_with_a_good_checkpoint(node: Node, web: guard.Guard) -> None:
    node.errors = {number: [RegistryError("no answer")] * 3 for number in (NEWEST, OLDER, OLDEST)}
    with pytest.raises(RestoreError, match="none of its 3 checkpoints holds") as lost:
        web._bring_back(None)
    assert node.pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert "they are kept in disk" in (lost.value.hint or "")
    assert len(web.state.kept) == 3 and web.state.phase == "lost"
    node.pauses.clear()
    web._backoff = 0.0  # as after each checkpoint
    web._bring_back(None)
    assert node.pauses == [0.0]


def test_checkpoints_are_removed_where_they_are(
    node: Node, web: guard.Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their registry may want a CA or a login of its own, as for `guard run`."""
    asked: list[object] = []

    def place(*words: object) -> Node:
        asked.extend(words)
        return node

    monkeypatch.setattr(guard_places, "place", place)
    web.state.save()
    ours = CliRunner().invoke(command, ["stop", "web", "--remove", "--ca-file", "/ca.pem", "--tls"])
    assert ours.exit_code == 0, ours.output
    assert ours.output == "no guard of web ran; its checkpoints are removed\n"
    assert asked[:2] == ["web", "disk"] and asked[2] == RegistryOptions(False, True, Path("/ca.pem"), None)
    assert guard_state.load("web") is None
    assert CliRunner().invoke(command, ["stop", "web"]).exit_code != 0


def test_an_interval_of_months_and_a_clock_that_is_set_back(
    node: Node, web: guard.Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """poll(2) takes 24 days at most."""
    process = subprocess.Popen(["sleep", "60"])

    class Running:
        def state(self) -> dict[str, Any]:
            return {"pid": process.pid}

    waited: list[float] = []

    class Poll:
        def register(self, *_: object) -> None:
            pass

        def poll(self, milliseconds: float) -> list[object]:
            assert milliseconds < 1 << 31
            waited.append(milliseconds / 1000)
            return [1] if len(waited) == 2 else []

    monkeypatch.setattr(select, "poll", Poll)
    monkeypatch.setattr(guard_end, "end", lambda *_: End("finished"))
    taken: list[int] = []
    monkeypatch.setattr(guard.Guard, "_take", lambda self, container: taken.append(1))
    try:
        for every, taken_at, wanted in ((90 * 86400.0, 0.0, [86400.0] * 2), (100.0, 86400.0, [100.0] * 2)):
            waited.clear()
            taken.clear()
            web._options = guard.Options(every=every)
            web.state.kept = [Kept(1, "/1", time.time() + taken_at, 0, 1)]
            web.state.recoveries = [Recovery(time.time() + taken_at, 1, 0, 0)]
            assert web._watch(Running()).how == "finished"  # type: ignore[arg-type]
            assert waited == pytest.approx(wanted, abs=1)
            assert len(taken) == (every == 100.0)
    finally:
        process.kill()
        process.wait()
