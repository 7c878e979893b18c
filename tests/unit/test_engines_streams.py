# SPDX-License-Identifier: Apache-2.0
"""What a restored container gets as its standard files: pipes, whatever its restorer had."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Says what each standard file of "the container" is, and writes to both outputs; told to fail, it drains them.
_RESTORE = """
import subprocess, sys
from cryoci.shim.engines import streams
script = 'for n in 0 1 2; do readlink /proc/self/fd/$n | cut -d: -f1; done; echo out; echo err >&2; cat'
with streams.lasting(quiet=sys.argv[1] == "quiet") as its:
    subprocess.run(["sh", "-c", script], stdin=its.stdin, stdout=its.stdout, stderr=its.stderr)
    its.drain()
"""


def restored(stdout: int, *, stdin: int = subprocess.DEVNULL, mode: str = "") -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", _RESTORE, mode],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        timeout=30,
    )
    assert done.returncode == 0
    return done.stdout or b""


def test_a_file_gets_what_the_container_says(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        restored(log.fileno())
    assert (tmp_path / "log").read_text().split() == ["pipe", "pipe", "pipe", "out", "err"]


def test_pipes_are_handed_on() -> None:
    assert restored(subprocess.PIPE).split() == [b"pipe"] * 3 + [b"out", b"err"]


def test_a_terminal_is_not_the_containers() -> None:
    ours, theirs = pty.openpty()
    try:
        restored(theirs, stdin=theirs)
        assert os.read(ours, 100).split() == [b"pipe"] * 3 + [b"out", b"err"]
    finally:
        os.close(ours)
        os.close(theirs)


def test_nobody_hears_a_quiet_one() -> None:
    assert restored(subprocess.PIPE, mode="quiet") == b""


def test_output_that_has_nowhere_to_go_is_still_read(tmp_path: Path) -> None:
    """/dev/full: the container must not get SIGPIPE, nor stand still."""
    if not os.access("/dev/full", os.W_OK):
        pytest.fail("this machine has no /dev/full")
    from cryoci.shim.engines import streams

    drain, end = os.pipe()
    with open("/dev/full", "wb") as full:
        reader = streams.relay(drain, full.fileno())
    os.close(drain)
    began = time.monotonic()
    for _ in range(100):
        os.write(end, b"x" * 65536)
    os.close(end)
    assert reader.wait(10) == 0 and time.monotonic() - began < 10
