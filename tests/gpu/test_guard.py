# SPDX-License-Identifier: Apache-2.0
"""A training loop on a GPU under `cryoci guard`, killed ten times at random."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import results
from tests.gpu.machine import BASE, Node, Trainer
from tests.gpu.results import report, spread

GPUS, _REASON = results.gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
if not GPUS:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU here: {_REASON}"))

KILLS = int(os.environ.get("GPU_KILLS", "10"))
INTERVAL = float(os.environ.get("GPU_GUARD_EVERY", "60"))  # what the pauses' share is told for
EVERY = float(os.environ.get("GPU_EVERY", "5"))  # seconds between checkpoints while it is being killed
GIB = "0.25"


class Job:
    """The trainer and its guard; `truth` is what each step's loss was in any of its lives."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.node = trainer.node
        self.truth: dict[int, str] = {}

    def guard(self) -> dict[str, Any]:
        """What the guard says of itself."""
        asked = self.node.cryoci("guard", "status", self.trainer.name, "--json", check=False)
        value: dict[str, Any] = json.loads(asked.stdout)[0]["state"] if asked.returncode == 0 else {}
        return value

    def lines(self, pid: int) -> list[str]:
        """Steps that process `pid` has written, each whole; [] when it is gone."""
        try:
            text = Path(f"/proc/{pid}/root/tmp/status.losses").read_text()
        except OSError:
            return []
        return text.splitlines()[: None if text.endswith("\n") else -1]

    def check(self, lines: list[str]) -> None:
        """No step may be missing, double, or other than it was in an earlier life."""
        for number, line in enumerate(lines):
            step, loss = line.split()
            assert int(step) == number and self.truth.setdefault(number, loss) == loss, (
                f"step {number}: {line}"
            )

    def reach(self, count: int, seconds: float = 60) -> float:
        """Wait until it has done `count` steps; returns when."""
        end, pid = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            if not pid or not os.path.exists(f"/proc/{pid}"):
                pid = int(self.trainer.state.get("pid", 0))
            if pid and len(self.lines(pid)) >= count:
                return time.monotonic()
            time.sleep(0.02)
        raise AssertionError(f"it did not reach step {count} in {seconds:g} s: {self.trainer.state}")

    def rate(self, seconds: float) -> float:
        """Steps a second."""
        before, began = len(self.lines(self.trainer.pid)), time.monotonic()
        time.sleep(seconds)
        return (len(self.lines(self.trainer.pid)) - before) / (time.monotonic() - began)

    def until(self, what: str, count: int, seconds: float = 60) -> dict[str, Any]:
        """The guard's state once it has `count` of something."""
        end = time.monotonic() + seconds
        while True:
            state = self.guard()
            found = state.get(what, 0)
            if (found if isinstance(found, int) else len(found)) >= count:
                return state
            assert time.monotonic() < end, state
            time.sleep(0.1)


def test_killed_ten_times() -> None:
    node = Node("runc")
    log = BASE / "guard.log"
    trainer = Trainer(node, "guarded", "--gib", GIB)
    began = time.monotonic()
    trainer.start()
    cold = time.monotonic() - began
    job = Job(trainer)
    words = ["--to=tmpfs", "--stable=1s", "--rootfs=none", f"--every={EVERY:g}s"]
    daemon = None
    back, down, lost = [], [], []
    try:
        alone = job.rate(5)
        daemon = node.daemon(log, "guard", trainer.name, *words)
        job.until("taken", 1)
        guarded = job.rate(4 * EVERY)
        taken, dice = job.guard()["taken"], random.Random(11)
        had: list[str] = []
        for number in range(1, KILLS + 1):
            time.sleep(dice.uniform(1.5, 2 * EVERY))
            pid = trainer.pid
            os.kill(pid, signal.SIGSTOP)  # so that its last words can be read
            had = job.lines(pid)
            job.check(had)
            os.kill(pid, signal.SIGKILL)
            at = time.monotonic()
            recovery = job.until("recoveries", number)["recoveries"][-1]
            back.append(job.reach(len(had)) - at)
            job.check(job.lines(trainer.pid))
            down.append(recovery["down"])
            lost.append(recovery["lost"])
        trainer.runs_on()
        said = log.read_text()
        pauses = [float(one) for one in re.findall(r"paused ([0-9.]+) s", said)]
        script = cold + len(had) / alone
        pause = statistics.median(pauses)
        report("guard: steps of the training checked", len(job.truth))
        report("guard: pause of a checkpoint", spread(pauses))
        report(
            "guard: steps a second",
            {"alone": round(alone, 1), f"a checkpoint every {EVERY:g} s": round(guarded, 1)},
        )
        report(f"guard: pauses at one every {INTERVAL:g} s (goal 5 %)", f"{pause / (INTERVAL + pause):.1%}")
        report("guard: down after a kill", spread(down))
        report("guard: work lost", spread(lost))
        report("guard: back at the step that it had", spread(back))
        report(
            "guard: from the script again",
            f"{cold:.1f} s to its first steps, {script:.1f} s to step {len(had)} at {alone:.1f} a second",
        )
        report("guard: recovery of that (goal 0.2)", f"{statistics.median(back) / script:.3f}")
        assert len(back) == KILLS and said.count("restored guarded") == KILLS
        assert job.guard()["taken"] - taken > KILLS // 3, said  # restored ones are checkpointed again
    finally:
        node.cryoci("guard", "stop", trainer.name, "--remove", check=False)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
            print(log.read_text()[-6000:])
        trainer.remove()
