# SPDX-License-Identifier: Apache-2.0
"""The runtime as a child: signals, statuses, files, deaths, and orphans for the engine's subreaper."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.fake_runtime import LAUNCHER, FakeNode

# `delete` of a recorded container is the one verb that runs as a child for every user.

TIED = """
import sys
sys.path.insert(0, sys.argv[1])
from cryoci.shim import child
sys.exit(child.run(sys.argv[2], sys.argv[2:]))
"""


@pytest.fixture
def node(fake: FakeNode) -> FakeNode:
    """A node with runc and container c1."""
    fake.add("runc")
    fake.call("create", "-b", str(fake.bundle()), "c1")
    fake.calls_file.unlink()
    return fake


def tied(node: FakeNode) -> list[str]:
    """A command that runs the fake as `checkpoint` and `restore` do."""
    return [
        "/usr/bin/python3",
        "-IS",
        "-c",
        TIED,
        str(LAUNCHER.parents[2]),
        str(node.bin / "runc"),
        "restore",
        "c1",
    ]


def start(node: FakeNode, command: list[str] | None = None) -> subprocess.Popen[bytes]:
    """Start `command` (default `delete c1`) and wait until the fake says that it is ready."""
    line = command or [str(node.launcher), "delete", "c1"]
    process = subprocess.Popen(line, env={**node.env, "FAKE_SLEEP": "20"}, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


def until(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Poll `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def alive(pid: int) -> bool:
    """Is `pid` a process that is no zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_exit_status(node: FakeNode, status: int) -> None:
    assert node.call("delete", "c1", env={"FAKE_STATUS": str(status)}).returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_death_by_signal(node: FakeNode, number: int) -> None:
    assert node.call("delete", "c1", env={"FAKE_SIGNAL": str(int(number))}).returncode == 128 + number


def test_signals_are_forwarded(node: FakeNode) -> None:
    process = start(node)
    process.send_signal(signal.SIGTERM)  # the fake exits 42 on it
    assert process.wait(10) == 42
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
        process = start(node)
        process.send_signal(number)
        assert process.wait(10) != 0
        assert not alive(node.calls[-1]["pid"])


def test_mask_session_and_files_are_the_callers(node: FakeNode, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    node.call("delete", "c1", pass_fds=[fd])
    os.close(fd)
    call = node.calls[-1]
    assert call["fds"][str(fd)] == str(tmp_path / "f")
    assert call["blocked"] == 0
    assert (call["sid"], call["pgid"]) == (os.getsid(0), os.getpgrp())


def test_the_child_dies_with_its_parent(node: FakeNode) -> None:
    process = start(node, tied(node))
    assert node.calls[-1]["pdeathsig"] == signal.SIGKILL
    process.kill()
    process.wait(10)
    assert until(lambda: not alive(node.calls[-1]["pid"]))


def test_ignored_sigchld_does_not_lose_the_status(node: FakeNode) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import os,signal,sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
         " os.execv(sys.argv[1], sys.argv[1:])", str(node.launcher), "delete", "c1"],
        env={**node.env, "FAKE_STATUS": "9"}, timeout=20,
    )  # fmt: skip
    assert result.returncode == 9


def test_terminal_keys_reach_the_runtime_once(node: FakeNode) -> None:
    script = node.bin / "runc"
    script.write_text(
        "#!/usr/bin/python3 -IS\nimport os,signal,time\nn=[0]\n"
        "signal.signal(signal.SIGINT, lambda *_: n.__setitem__(0, n[0]+1))\nos.write(1, b'ready\\n')\n"
        "end=time.time()+1\nwhile time.time()<end: time.sleep(0.1)\nos._exit(n[0])\n"
    )
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execve(node.launcher, [str(node.launcher), "delete", "c1"], node.env)
    try:
        while b"ready" not in os.read(terminal, 100):
            pass
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 1


SUBREAPER = 36


def test_what_a_detached_runtime_leaves_goes_to_the_subreaper(node: FakeNode) -> None:
    # like conmon: subreaper, runs the runtime, waits for it, then for the container's init
    pid_file = node.directory / "pid"
    (node.bin / "runc").write_text(
        "#!/usr/bin/python3 -IS\nimport os,time\npid=os.fork()\n"
        f"if pid == 0:\n    time.sleep(30)\n    os._exit(0)\nopen({str(pid_file)!r},'w').write(str(pid))\n"
    )
    libc = ctypes.CDLL(None)
    assert libc.prctl(SUBREAPER, 1, 0, 0, 0) == 0
    try:
        line = [str(node.launcher), "delete", "c1"]
        assert subprocess.run(line, env=node.env, stdout=subprocess.DEVNULL, timeout=20).returncode == 0
        init = int(pid_file.read_text())
        assert Path(f"/proc/{init}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid())
        os.kill(init, signal.SIGKILL)
        assert os.waitpid(init, 0) == (init, signal.SIGKILL)
    finally:
        libc.prctl(SUBREAPER, 0, 0, 0, 0)
