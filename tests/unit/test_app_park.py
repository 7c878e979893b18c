# SPDX-License-Identifier: Apache-2.0
"""App hooks around parking: done before, remembered while parked, owed until they succeed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import ConflictError, HookError, SpaceError
from cryoci.shim import app
from cryoci.shim.engines import asleep, gpu
from cryoci.shim.engines.asleep import Asleep
from cryoci.shim.engines.checkpoint import checkpoint
from cryoci.shim.engines.options import DumpOptions
from cryoci.shim.gpu import dump, nvml
from cryoci.shim.gpu.tasks import Task
from tests.unit.live_runtime import LiveRuntime, running
from tests.unit.test_app import NOTED

OFF = app.Choice(off=True)
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a checkpoint needs root")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with running(tmp_path, monkeypatch) as made:
        made.spec["annotations"] = dict(NOTED)
        yield made


def program(live: LiveRuntime) -> str:
    return next(word for word in live.words("exec") if word.endswith("-model"))


def test_asked_before_the_freeze_and_after_the_thaw(live: LiveRuntime) -> None:
    heard: list[list[str]] = []
    done = gpu.park(live.container(), lulled=lambda: heard.append(live.verbs))
    assert live.verbs == ["exec", "pause"] and program(live) == "/bin/sleep-model"
    assert heard == [["exec"]] and "pre-checkpoint hooks" in done.seconds
    assert not gpu.park(live.container()).changed
    done = gpu.unpark(live.container())
    assert live.verbs == ["exec", "pause", "resume", "exec"] and program(live) == "/bin/wake-model"
    assert "post-restore hooks" in done.seconds
    assert not gpu.unpark(live.container()).changed and len(live.verbs) == 4


def test_what_was_parked_without_is_unparked_without(live: LiveRuntime) -> None:
    gpu.park(live.container(), OFF)
    gpu.unpark(live.container())
    gpu.park(live.container())
    gpu.unpark(live.container(), hooks=False)
    assert live.verbs == ["pause", "resume", "exec", "pause", "resume"]
    assert not gpu.unpark(live.container()).changed  # nothing is owed any more


def test_flags_of_the_park_count_for_the_unpark(live: LiveRuntime) -> None:
    gpu.park(
        live.container(),
        app.Choice(pre_checkpoint=("exec: /bin/a-model",), post_restore=("exec: /bin/b-model",)),
    )
    assert program(live) == "/bin/a-model"
    gpu.unpark(live.container())
    assert program(live) == "/bin/b-model"


def test_one_that_cannot_prepare_itself_is_not_parked(live: LiveRuntime) -> None:
    live.wish(exec={"status": 3, "say": "model is busy"})
    with pytest.raises(HookError, match="model is busy"):
        gpu.park(live.container())
    assert live.verbs == ["exec", "exec"] and program(live) == "/bin/wake-model"  # it may be half asleep
    assert live.status == "running" and asleep.load(live.container()) is None


def test_one_that_cannot_be_frozen_is_woken(live: LiveRuntime) -> None:
    live.wish(pause={"status": 1})
    with pytest.raises(Exception, match="pause"):
        gpu.park(live.container())
    assert live.verbs == ["exec", "pause", "exec"] and asleep.load(live.container()) is None


def test_it_is_owed_until_it_succeeds(live: LiveRuntime) -> None:
    gpu.park(live.container())
    live.wish(exec={"status": 1, "say": "out of memory"})
    with pytest.raises(HookError, match=r"web runs, and is not itself yet: .*out of memory") as caught:
        gpu.unpark(live.container())
    assert caught.value.hint == "`cryoci unpark web` tries that again" and live.status == "running"
    live.wish()
    assert gpu.unpark(live.container()).changed and program(live) == "/bin/wake-model"
    assert not gpu.unpark(live.container()).changed


def test_one_that_takes_turns_stays_parked_instead(live: LiveRuntime) -> None:
    gpu.park(live.container())
    live.wish(exec={"status": 1})
    with pytest.raises(HookError, match="is not itself yet"):
        gpu.unpark_or_stay(live.container())
    assert live.status == "paused" and gpu.is_parked(live.container())
    live.wish()
    gpu.unpark_or_stay(live.container())
    assert live.status == "running" and asleep.load(live.container()) is None


def test_it_wakes_when_others_have_made_room(live: LiveRuntime) -> None:
    heard: list[list[str]] = []
    gpu.park(live.container())
    gpu.unpark(live.container(), others=lambda: heard.append(live.verbs))
    assert heard == [["exec", "pause", "resume"]] and live.verbs[-1] == "exec"
    gpu.park(live.container(), OFF)
    gpu.unpark(live.container(), others=lambda: heard.append([]))
    assert len(heard) == 1  # who is not asleep waits for nobody


def test_who_was_killed_in_between_is_repaired(live: LiveRuntime) -> None:
    """A cryoci that died between the hooks and the freeze, of a park or a checkpoint."""
    asleep.note(live.container(), Asleep(app.both(live.container(), app.Choice())[1]))
    assert gpu.repair(live.container()) == "post-restore hooks done"
    assert program(live) == "/bin/wake-model"
    assert gpu.repair(live.container()) == "nothing was left to repair"


def test_a_note_about_another_process_is_none(live: LiveRuntime) -> None:
    asleep.note(live.container(), Asleep(app.both(live.container(), app.Choice())[1]))
    (note,) = (live.directory / "run").rglob("asleep.json")
    note.write_text(note.read_text().replace('"start": ', '"start": 1'))
    assert asleep.load(live.container()) is None
    note.write_text("{")
    assert asleep.load(live.container()) is None


def test_a_parked_one_is_checkpointed_asleep(live: LiveRuntime, tmp_path: Path) -> None:
    """It is not asked again; the image's own hooks wake what is restored."""
    gpu.park(live.container())
    with checkpoint(live.container(), tmp_path / "out", DumpOptions(leave_running=True)):
        pass
    assert live.verbs.count("exec") == 1 and live.status == "paused"
    assert asleep.load(live.container()) is not None
    with checkpoint(live.container(), tmp_path / "two", DumpOptions()):
        pass
    assert live.verbs.count("exec") == 1 and live.status == "gone"
    assert not list((live.directory / "run").rglob("asleep.json"))


def test_one_that_was_parked_without_cannot_prepare_itself_now(live: LiveRuntime, tmp_path: Path) -> None:
    gpu.park(live.container(), OFF)
    with pytest.raises(HookError, match="is paused"):
        with checkpoint(live.container(), tmp_path / "out", DumpOptions()):
            pass


def test_a_paused_one_is_not_asked(live: LiveRuntime) -> None:
    live.set_status("paused")
    with pytest.raises(ConflictError):
        gpu.park(live.container())
    assert live.verbs == []


UUID = "GPU-" + "0" * 8 + "-0000-0000-0000-" + "0" * 12


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> nvml.Gpu:
    """10 GiB of it are free."""
    one = nvml.Gpu(UUID, "NVIDIA H200", 0, 0, "9.0", 140 << 30, 10 << 30)

    class Management:
        def __enter__(self) -> Management:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def gpus(self) -> list[nvml.Gpu]:
            return [one]

    monkeypatch.setattr(nvml, "opened", Management)
    return one


def test_room_is_looked_for_that_it_takes_when_it_is_awake(one_gpu: nvml.Gpu) -> None:
    """What was parked asleep holds little; the restore alone would fit."""
    held = dump.made("580", 13000, [one_gpu], [Task(1, 1, 1, "python", {UUID: 1 << 30})])
    gpu.check_room(held, {UUID: 9 << 30})
    with pytest.raises(SpaceError):
        gpu.check_room(held, {UUID: 11 << 30})


def test_one_that_finds_no_room_to_wake_is_parked_again(live: LiveRuntime, one_gpu: nvml.Gpu) -> None:
    gpu.park(live.container())
    (journal,) = (live.directory / "run").rglob("gpu.json")
    value = json.loads(journal.read_text())
    value["dump"]["gpus"] = [dump.describe(one_gpu)]
    journal.write_text(json.dumps(value))
    after = app.both(live.container(), app.Choice())[1]
    asleep.note(live.container(), Asleep(after, {UUID: 11 << 30}))
    with pytest.raises(SpaceError):
        gpu.unpark(live.container(), others=lambda: None)
    assert live.verbs == ["exec", "pause", "resume", "pause"] and gpu.is_parked(live.container())
    asleep.note(live.container(), Asleep(after, {UUID: 9 << 30}))
    gpu.unpark(live.container(), others=lambda: None)
    assert live.verbs[-1] == "exec" and live.status == "running"
