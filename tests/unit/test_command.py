# SPDX-License-Identifier: Apache-2.0
"""Programs that cryoci runs, and what is said when they fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cryoci import command
from cryoci.errors import NotFoundError, ToolError


def test_run() -> None:
    result = command.run(["sh", "-c", "cat; echo $X; pwd; echo e >&2"], input=b"in", env={"X": "1"}, cwd="/")
    assert result.stdout == b"in1\n/\n"
    assert result.stderr == b"e\n"


def test_stdin_is_empty() -> None:
    assert command.run(["cat"]).stdout == b""


def test_failure_can_be_pasted() -> None:
    with pytest.raises(ToolError) as caught:
        command.run(["sh", "-c", "echo out; echo 'it broke' >&2; exit 3"], hint="try again")
    assert caught.value.message == (
        "command failed with status 3: it broke\n  command: sh -c 'echo out; echo '\"'\"'it broke'\"'\"' >&2; exit 3'"
    )
    assert caught.value.hint == "try again"
    line = caught.value.message.rpartition("command: ")[2]
    assert subprocess.run(line, shell=True, capture_output=True).returncode == 3  # noqa: S602


def test_failure_that_says_nothing_on_stderr() -> None:
    with pytest.raises(ToolError, match="status 1: only out"):
        command.run(["sh", "-c", "echo only out; exit 1"])
    with pytest.raises(ToolError, match=r"command failed with status 1\n"):
        command.run(["false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_signal() -> None:
    with pytest.raises(ToolError, match="signal 9"):
        command.run(["sh", "-c", "kill -9 $$"])


def test_long_and_odd_words_are_cut_and_decoded() -> None:
    with pytest.raises(ToolError) as caught:
        command.run(["sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x; printf '\\377end'; exit 1"])
    assert len(caught.value.message) < 2300
    assert "\ufffdend" in caught.value.message


def test_unchecked() -> None:
    assert command.run(["false"], check=False).returncode == 1


def test_timeout() -> None:
    with pytest.raises(ToolError, match=r"no answer within 0\.1 s from: sleep 9"):
        command.run(["sleep", "9"], timeout=0.1)


def test_no_such_program() -> None:
    with pytest.raises(NotFoundError) as caught:
        command.run(["no-such-program"], check=False)
    assert caught.value.hint == "install it, or put it on PATH: no-such-program"


def test_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.which("chroot").endswith("/sbin/chroot"), "sbin counts even when PATH lacks it"
    (tmp_path / "tool").write_text("#!/bin/sh\n")
    with pytest.raises(NotFoundError) as caught:
        command.which("tool", package="toolkit")
    assert (caught.value.message, caught.value.hint) == ("tool is not installed", "apt-get install toolkit")
    (tmp_path / "tool").chmod(0o755)
    assert command.which("tool") == str(tmp_path / "tool")
