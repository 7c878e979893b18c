# SPDX-License-Identifier: Apache-2.0
"""cuda-checkpoint as CRIU's plugin calls it, case by case (plugins/cuda/cuda_plugin.c, criu 4.0 to 4.2)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.shim.gpu.cuda import Driver, State
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program
from tests.unit.test_launcher_imports import imported

FRONT = Path(__file__).resolve().parents[2] / "shim" / "gpu" / "front.py"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the driver needs the right to ptrace")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "devices").write_text(build.devices(UUIDS[:2]))
    monkeypatch.setenv("FAKEGPU_HOME", str(tmp_path))
    (tmp_path / "cuda-checkpoint").symlink_to(FRONT)  # as it is installed
    return tmp_path


@pytest.fixture
def program(home: Path) -> Iterator[Program]:
    made = Program(home, "--mib", "1")
    yield made
    made.close()


def call(home: Path, *words: str) -> tuple[int, str]:
    """Status and output; stdout and stderr are one pipe, as the plugin has it."""
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(build.library()),
        "PATH": f"{home}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["cuda-checkpoint", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        close_fds=True,
    )
    return done.returncode, done.stdout.decode()


def text(code: int) -> str:
    """What the driver calls an error."""
    return driver()._text(code)


def driver() -> Driver:
    return Driver(str(build.library() / "libcuda.so.1"))


def test_help_names_action_within_2047_bytes(home: Path) -> None:
    for word in ("-h", "--help"):
        status, said = call(home, word)
        assert status == 0 and "--action" in said[:2047]


def test_get_restore_tid(home: Path, program: Program) -> None:
    """A number and a newline, nothing else: the plugin calls atoi on it."""
    status, said = call(home, "--get-restore-tid", "--pid", str(program.pid))
    assert (status, said) == (0, f"{driver().restore_thread(program.pid)}\n")
    status, said = call(home, "--get-restore-tid", "--pid", str(os.getpid()))
    assert (status, said) == (1, f"Could not find restore thread for process ID {os.getpid()}\n")


def test_get_state_takes_the_restore_thread_too(home: Path, program: Program) -> None:
    tid = driver().restore_thread(program.pid)
    for number in (program.pid, tid):
        assert call(home, "--get-state", "--pid", str(number)) == (0, "running\n")
    status, said = call(home, "--get-state", "--pid", str(os.getpid()))
    assert status == 1 and said == f'Could not get state on process ID {os.getpid()}: "invalid argument"\n'


def test_the_plugins_whole_round(home: Path, program: Program) -> None:
    pid = ("--pid", str(program.pid))
    for words, state in (
        (("--action", "lock", *pid, "--timeout", "10000"), "locked"),
        (("--action", "checkpoint", *pid), "checkpointed"),
        (("--action", "restore", *pid), "locked"),
        (("--action", "unlock", *pid), "running"),
    ):
        assert call(home, *words) == (0, "")
        assert call(home, "--get-state", *pid) == (0, f"{state}\n")
    program.runs_on()


def test_toggle_and_device_map(home: Path, program: Program) -> None:
    pid = ("--pid", str(program.pid))
    assert call(home, "--toggle", *pid) == (0, "")
    assert driver().state(program.pid) is State.CHECKPOINTED
    status, said = call(home, "-t", *pid, "-d", f"{UUIDS[0]}={UUIDS[1]}")  # not every GPU that it saw
    assert (status, said) == (1, f'Could not restore on process ID {program.pid}: "invalid argument"\n')
    swap = f"{UUIDS[0]}={UUIDS[1]},{UUIDS[1]}={UUIDS[0]}"
    assert call(home, "--action", "restore", *pid, "--device-map", swap) == (0, "")
    assert call(home, "--action", "unlock", *pid) == (0, "")
    assert program.wait(program.status()["count"] + 2)["uuid"] == UUIDS[1].removeprefix("GPU-").replace(
        "-", ""
    )


def test_an_action_that_fails_says_why_in_what_the_plugin_logs(home: Path, program: Program) -> None:
    """Of the output it keeps 127 bytes. A lock that gives up leaves the process running."""
    pid = ("--pid", str(program.pid))
    for action, code in (("lock", 600), ("lock", 999), ("checkpoint", 2), ("restore", 304), ("unlock", 401)):
        for count in home.glob("count.*"):
            count.unlink()
        (home / "faults").write_text(f"{action} 1 {code} before\n")
        status, said = call(
            home, "--action", action, *pid, *(("--timeout", "50") if action == "lock" else ())
        )
        assert status == 1 and said == f'Could not {action} on process ID {program.pid}: "{text(code)}"\n'
        assert len(said) <= 127
    (home / "faults").unlink()
    assert call(home, "--get-state", *pid) == (0, "running\n")
    program.runs_on()


def test_a_lock_that_is_not_given_in_time(home: Path) -> None:
    slow = Program(home, "--mib", "1", "--kernel-ms", "700")
    time.sleep(0.3)  # it is in its second kernel then
    try:
        began = time.monotonic()
        status, said = call(home, "--action", "lock", "--pid", str(slow.pid), "--timeout", "100")
        assert (status, said) == (1, f'Could not lock on process ID {slow.pid}: "{text(600)}"\n')
        assert time.monotonic() - began < 0.6  # before the kernel ends
        assert call(home, "--get-state", "--pid", str(slow.pid)) == (0, "running\n")
    finally:
        slow.close()


def test_a_process_that_is_lost_and_one_that_is_gone(home: Path, program: Program) -> None:
    """The plugin takes each state but running, locked and checkpointed for an error."""
    pid = ("--pid", str(program.pid))
    (home / "faults").write_text("lock 1 719 failed\n")
    assert call(home, "--action", "lock", *pid)[0] == 1
    assert call(home, "--get-state", *pid) == (0, "failed\n")
    program.close()
    assert call(home, "--get-restore-tid", *pid)[0] == 1
    status, said = call(home, "--get-state", *pid)
    assert status == 1 and said.count("\n") == 1


def test_what_the_plugin_asks_of_every_process_costs_no_import_of_note(home: Path, program: Program) -> None:
    """Two or three times for each: no parser of options, no JSON, no subprocess, and no cuInit."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(build.library())}
    pid = ("--pid", str(program.pid))
    for words in (("--get-restore-tid", *pid), ("--get-state", *pid), ("--action", "lock", *pid)):
        ours = {name for name in imported(FRONT, *words, env=environment) if name.startswith("cryoci")}
        assert ours <= {f"cryoci{name}" for name in ("", ".errors", ".shim", ".shim.cgroup", ".shim.gpu",
                                                     ".shim.gpu.cuda", ".shim.gpu.halted")}  # fmt: skip
        heavy = {
            "argparse",
            "json",
            "subprocess",
            "dataclasses",
            "pathlib",
            "re",
            "tempfile",
            "logging",
            "shutil",
        }
        assert not heavy & imported(FRONT, *words, env=environment)
    assert not {"ctypes", "cryoci"} & imported(FRONT, "-h", env=environment)


@pytest.mark.parametrize(
    "words",
    [
        (), ("--pid", "1"), ("--toggle",), ("--action", "lock"), ("--action", "eat", "--pid", "1"), ("--frob",),
        ("--toggle", "--pid", "x"), ("--get-state", "--toggle", "--pid", "1"), ("--pid",),
        ("--action", "lock", "--pid", "1", "--timeout", "soon"), ("--toggle", "--pid", "1", "-d", "a=b"),
        ("--get-state", "--pid", "9" * 20), ("--get-state", "--pid", "2147483648"), ("--get-state", "--pid", "\u0663"),
        ("--action", "lock", "--pid", "1", "--timeout", "4294967296"), ("--get-state", "--pid=-1"),
    ],
    ids=ascii,
)  # fmt: skip
def test_misuse(home: Path, words: tuple[str, ...]) -> None:
    status, said = call(home, *words)
    assert status == (1 if "-d" in words else 2)
    assert said.count("\n") == 1 and "Traceback" not in said


def test_no_driver(home: Path) -> None:
    """The plugin reads a failure as: no CUDA in this process."""
    done = subprocess.run(
        [FRONT, "--get-restore-tid", "--pid", "1"], capture_output=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
