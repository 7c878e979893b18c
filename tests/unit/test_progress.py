# SPDX-License-Identifier: Apache-2.0
"""What long work tells: bars on a real terminal, lines in a log, and how a directory grows."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cryoci.ociimage import contents, image, progress, reference, report
from tests.unit.images import make_checkpoint


class Heard:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int | None]] = []
        self.passed = 0
        self.ended = 0

    def start(self, name: str, total: int | None) -> object:
        self.parts.append((name, total))
        return len(self.parts)

    def advance(self, token: object, n: int) -> None:
        self.passed += n

    def done(self, token: object) -> None:
        self.ended += 1


def test_lines_say_how_much_how_fast_how_long() -> None:
    said: list[str] = []
    with progress.lines(said.append, 0.0)("push web:1") as told:
        first, second = told.start("pages", 60_000_000), told.start("rootfs", 40_000_000)
        time.sleep(0.02)
        told.advance(first, 25_000_000)
        told.advance(second, 25_000_000)
        told.done(first)
        told.advance(second, 60_000_000)
    assert re.fullmatch(r"push web:1: 25.0 MB of 100 MB, [0-9.]+ [MG]B/s, [0-9.]+ s left", said[0])
    assert said[1].startswith("push web:1: 50.0 MB of 100 MB, ")
    assert re.fullmatch(r"push web:1: 110 MB, [0-9.]+ [MG]B/s", said[2])  # more than was expected


def test_lines_without_a_total_and_short_work() -> None:
    said: list[str] = []
    with progress.lines(said.append, 0.0)("fetch") as told:
        told.advance(told.start("x", None), 5)
    assert re.fullmatch(r"fetch: 5 B, .*B/s", said[0])
    with progress.lines(said.append)("short") as told:
        told.advance(told.start("x", 5), 5)
    assert len(said) == 1


def test_a_directory_that_grows(tmp_path: Path) -> None:
    heard = Heard()
    with progress.growing(heard, tmp_path, 100):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/pages-1.img").write_bytes(bytes(70))
        end = time.monotonic() + 20
        while heard.passed < 70 and time.monotonic() < end:
            time.sleep(0.05)
        (tmp_path / "sub/pages-1.img").unlink()
    assert heard.parts == [("", 100)] and heard.passed in (0, 70) and heard.ended == 1
    with progress.silent("x") as nobody, progress.growing(nobody, tmp_path, None):
        pass


def test_what_is_read_for_a_look_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's archive is read to its end, and layers that do not say what they hold are fetched."""
    made = make_checkpoint(tmp_path / "ck", pages=1 << 20)
    subprocess.run(["tar", "-C", made, "-cf", tmp_path / "a.tar", "."], check=True)
    ref = reference.parse(f"oci:{tmp_path}/layout:1")
    assert isinstance(ref, reference.LayoutRef)
    image.push(made, ref)
    archived = reference.ArchiveRef(tmp_path / "a.tar")
    for shown in (1 << 40, 0):
        monkeypatch.setattr(contents, "_SHOWN", shown)
        heard = Heard()
        report.inspect(archived, progress=heard)
        report.inspect(ref, memory=True, progress=heard)
        if shown:
            assert heard.parts == []
    size = (tmp_path / "a.tar").stat().st_size
    assert heard.parts[0] == ("read a.tar", size) and len(heard.parts) > 1
    assert all(name.startswith("fetch ") for name, _ in heard.parts[1:])
    assert heard.passed == sum(total or 0 for _, total in heard.parts) and heard.ended == len(heard.parts)


_PROGRAM = """
import sys, time
from cryoci.cli import output
said = output.work(output.note, output.terminal())
with said("push web:1") as told:
    token = told.start("pages-1.img", 2000000)
    for _ in range(2):
        told.advance(token, 1000000)
        time.sleep(0.3)
    told.done(token)
print("a result")
"""


def run(terminal: bool) -> tuple[str, str]:
    """What the program prints, and what its terminal (or its stderr) shows."""
    ours, theirs = pty.openpty()
    stderr = theirs if terminal else subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=stderr)
    os.close(theirs)
    shown = b""
    while terminal:
        try:
            shown += (more := os.read(ours, 65536))
        except OSError:  # the other end is closed
            break
        if not more:
            break
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, err
    return out.decode(), (shown if terminal else err).decode()


def test_bars_on_a_terminal() -> None:
    out, shown = run(terminal=True)
    assert out == "a result\n"
    assert "push web:1 pages-1.img" in shown and "1.0/2.0 MB" in shown and "MB/s" in shown


def test_no_bars_in_a_file() -> None:
    assert run(terminal=False) == ("a result\n", "")
