# SPDX-License-Identifier: Apache-2.0
"""What a capture or fill tells of its progress, and the bar that is made of it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cryoci.shim.memory.meter import NAME, Meter, Reading, read
from cryoci.uses import moving


class Bars:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int | None]] = []
        self.moved: list[int] = []
        self.ended: list[object] = []

    def start(self, name: str, total: int | None) -> object:
        self.begun.append((name, total))
        self.moved.append(0)
        return len(self.begun) - 1

    def advance(self, token: object, n: int) -> None:
        assert isinstance(token, int)
        self.moved[token] += n

    def done(self, token: object) -> None:
        self.ended.append(token)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_meter_is_there_while_something_moves(tmp_path: Path) -> None:
    where = str(tmp_path)
    assert read(where) is None
    with Meter(where, "capture", 5 << 30) as meter:
        first = read(where)
        assert first is not None and (first.phase, first.done, first.total) == ("capture", 0, 5 << 30)

        def work() -> None:
            for _ in range(100):
                meter.add(1 << 20)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        meter._next = 0.0
        meter.add(0)
        assert read(where) == Reading("capture", 400 << 20, 5 << 30, first.run)
    assert read(where) is None
    assert os.listdir(where) == []


def test_a_meter_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    with Meter(str(tmp_path / "missing"), "fill", 7) as meter:
        meter.add(7)
    (tmp_path / NAME).write_text("nonsense")
    assert read(str(tmp_path)) is None


def test_bars_follow_the_runtime_from_phase_to_phase(tmp_path: Path) -> None:
    bars = Bars()
    with moving.shown(bars, str(tmp_path)):
        for phase, total in (("gpu-out", 90), ("capture", 100), ("fill", 80)):
            with Meter(str(tmp_path), phase, total) as meter:
                meter.add(30)
                until(lambda: bars.begun[-1:] and bars.begun[-1][1] == total)  # noqa: B023
                meter._next = 0.0
                meter.add(total - 30)
                until(lambda: bars.moved[-1] == total)  # noqa: B023
    assert bars.begun == [("GPU memory to the host", 90), ("memory: capture", 100), ("memory: fill", 80)]
    assert bars.moved == [90, 100, 80] and bars.ended == [0, 1, 2]


def test_what_moved_before_is_not_shown_and_a_new_container_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path))
    other, new = (tmp_path / "containers/default" / name for name in ("other", "new"))
    other.mkdir(parents=True)
    bars = Bars()
    with Meter(str(other), "capture", 1 << 40), moving.shown(bars):
        new.mkdir()
        with Meter(str(new), "fill", 9):
            until(lambda: bars.begun)
        until(lambda: bars.ended)
    assert bars.begun == [("memory: fill", 9)]


def test_nobody_looks_without_bars(tmp_path: Path) -> None:
    before = threading.active_count()
    with moving.shown(None, str(tmp_path)):
        assert threading.active_count() == before


PROGRAM = """
import sys, time
from cryoci.cli import output
from cryoci.shim.memory.meter import Meter
from cryoci.uses import moving
where, quiet = sys.argv[1], sys.argv[2] == "quiet"
with output.progress(quiet) as progress, moving.shown(progress, where):
    print("BEFORE", file=sys.stderr, flush=True)
    with Meter(where, "capture", 4_000_000_000) as meter:
        for _ in range(8):
            meter.add(400_000_000)
            time.sleep(0.12)
    time.sleep(0.3)
    print("AFTER", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("how", ["loud", "quiet"])
def test_a_terminal_shows_rate_and_time_left(tmp_path: Path, how: str) -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), how], stderr=slave, env=environment
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                data = os.read(master, 1 << 16)
            except OSError:
                break
            if not data:
                break
            shown += data
    os.close(master)
    assert process.returncode == 0, shown
    if how == "quiet":
        assert shown == b"BEFORE\r\nAFTER\r\n"
        return
    text = shown.decode()
    assert text.startswith("BEFORE\r\n")  # nothing touches the terminal before something moves
    assert "memory: capture" in text and "4.0 GB" in text and "GB/s" in text and "0:00:0" in text
    assert text.endswith("AFTER\r\n")
    assert "memory: capture" not in text.rpartition("\x1b[2K")[2]  # and it is gone in the end
