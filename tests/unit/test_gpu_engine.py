# SPDX-License-Identifier: Apache-2.0
"""CUDA processes out of their GPUs and back, on the fake driver: errors of every step leave them running."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import CheckpointError, ConflictError, CryociError, UnsupportedError
from cryoci.shim.gpu import engine, nvml, tasks
from cryoci.shim.gpu.cuda import Code, CudaError, Driver, State
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the driver needs the right to ptrace")

CODES = [int(code) for code in Code if code is not Code.SUCCESS]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with two GPUs of one chip and one of another."""
    text = build.devices(UUIDS[:2]) + build.devices(UUIDS[2:3], chip="Fake L4")
    (tmp_path / "devices").write_text(text)
    monkeypatch.setenv("FAKEGPU_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def driver(home: Path) -> Driver:
    return Driver(str(build.library() / "libcuda.so.1"))


@pytest.fixture
def program(home: Path) -> Iterator[Program]:
    made = Program(home, "--mib", "1")
    yield made
    made.close()


@pytest.fixture
def family(home: Path) -> Iterator[Program]:
    """A process with two CUDA children."""
    made = Program(home, "--mib", "1", "--children", "2")
    try:
        for child in range(2):
            made.wait(1, child=child)
        yield made
    finally:
        made.close()


def suspend(driver: Driver, program: Program, lock_ms: int = 5000) -> list[tasks.Task]:
    return engine.suspend(driver, lambda: tasks.cuda(driver, program.pid), lock_ms=lock_ms)


def faults(home: Path, *lines: str) -> None:
    for count in home.glob("count.*"):
        count.unlink()
    (home / "faults").write_text("\n".join(lines) + "\n")


def test_out_and_in_again(driver: Driver, program: Program) -> None:
    (task,) = suspend(driver, program)
    assert (task.pid, task.inner, task.alive) == (program.pid, program.pid, True)
    assert driver.state(program.pid) is State.CHECKPOINTED
    before = program.status()["count"]
    maps = Path(f"/proc/{program.pid}/maps").read_text()
    assert "secretmem" not in maps  # its GPU memory is its own memory now
    assert program.status()["count"] == before
    engine.resume(driver, [task])
    engine.resume(driver, [task])  # once more does no harm
    program.runs_on()


def test_one_that_stands_still_is_refused(driver: Driver, program: Program) -> None:
    """The driver would wait for it for ever."""
    os.kill(program.pid, signal.SIGSTOP)
    try:
        while Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        with pytest.raises(ConflictError, match="stopped by a signal") as e:
            suspend(driver, program)
        assert f"kill -CONT {program.pid}" in str(e.value.hint)
        assert driver.restore_thread(program.pid) is not None  # of this one it answers
    finally:
        os.kill(program.pid, signal.SIGCONT)
    engine.resume(driver, suspend(driver, program))
    program.runs_on()


def test_all_of_a_family(driver: Driver, family: Program) -> None:
    found = suspend(driver, family)
    assert len(found) == 3
    assert {driver.state(task.pid) for task in found} == {State.CHECKPOINTED}
    engine.resume(driver, found)
    for child in (None, 0, 1):
        family.wait(family.status(child)["count"] + 2, child=child)


def test_what_is_checkpointed_already_stays_so(driver: Driver, program: Program) -> None:
    (task,) = suspend(driver, program)
    assert [t.pid for t in suspend(driver, program)] == [task.pid]
    assert driver.state(program.pid) is State.CHECKPOINTED
    engine.resume(driver, [task])


def test_a_process_that_another_tool_has_locked_is_left_alone(driver: Driver, program: Program) -> None:
    driver.lock(program.pid)
    with pytest.raises(ConflictError, match="something else operates on it"):
        suspend(driver, program)
    assert driver.state(program.pid) is State.LOCKED
    driver.unlock(program.pid)


def test_work_that_does_not_end(home: Path, driver: Driver) -> None:
    slow = Program(home, "--mib", "1", "--kernel-ms", "3000")
    time.sleep(0.3)  # it is in its second kernel then
    try:
        with pytest.raises(CudaError, match="could not lock") as caught:
            suspend(driver, slow, lock_ms=100)
        assert caught.value.code == Code.NOT_READY
        assert "lock-timeout" in (caught.value.hint or "")
        assert driver.state(slow.pid) is State.RUNNING
    finally:
        slow.close()


def test_other_processes_are_none(driver: Driver) -> None:
    assert driver.restore_thread(os.getpid()) is None
    assert tasks.cuda(driver, os.getpid()) == []
    with pytest.raises(CudaError, match="could not query"):
        driver.state(os.getpid())


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("step", ["lock", "checkpoint"])
@pytest.mark.parametrize("code", CODES)
def test_every_error_on_the_way_out(
    home: Path, driver: Driver, program: Program, step: str, mode: str, code: int
) -> None:
    """Whether the driver did what it reports as failed or not, the process runs afterwards."""
    faults(home, f"{step} 1 {code} {mode}")
    with pytest.raises(CryociError) as caught:
        suspend(driver, program)
    assert f"(error {code})" in str(caught.value)
    assert driver.state(program.pid) is State.RUNNING
    program.runs_on()


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_error_on_one_of_a_family(
    home: Path, driver: Driver, family: Program, step: str, nth: int
) -> None:
    faults(home, f"{step} {nth} 999 before")
    with pytest.raises(CudaError):
        suspend(driver, family)
    for child in (None, 0, 1):
        family.wait(family.status(child)["count"] + 2, child=child)


def test_every_error_of_unlock(home: Path, driver: Driver, program: Program) -> None:
    for code in CODES:
        found = suspend(driver, program)
        faults(home, f"unlock 1 {code} after")  # an error, and it runs all the same: this is success
        engine.resume(driver, found)
        program.runs_on()
        found = suspend(driver, program)
        faults(home, f"unlock 1 {code} before")
        with pytest.raises(CudaError, match=f"error {code}"):
            engine.resume(driver, found)
        assert driver.state(program.pid) is State.LOCKED
        engine.resume(driver, found)
        program.runs_on()


def test_every_error_on_the_way_in(home: Path, driver: Driver, program: Program) -> None:
    """It can be tried again, whether the driver has said no before it began or after it was done."""
    for code in CODES:
        for mode, left in (("before", State.CHECKPOINTED), ("after", State.LOCKED)):
            found = suspend(driver, program)
            faults(home, f"restore 1 {code} {mode}")
            if (code, mode) == (
                Code.ILLEGAL_STATE,
                "after",
            ):  # somebody's call before has done it: that will do
                engine.resume(driver, found)
            else:
                with pytest.raises(CudaError, match=f"error {code}"):
                    engine.resume(driver, found)
                assert driver.state(program.pid) is left
                engine.resume(driver, found)
            program.runs_on()


def test_every_error_of_a_question(home: Path, driver: Driver, program: Program) -> None:
    """Asked before, between and after the steps: the process runs on, or can be helped."""
    for code in CODES:
        faults(home, f"thread 1 {code} before")
        if code in (Code.INVALID_VALUE, Code.NOT_INITIALIZED):  # the driver's words for: no CUDA here
            assert suspend(driver, program) == []
        else:
            with pytest.raises(CudaError, match=f"error {code}"):
                suspend(driver, program)
        for nth in (1, 2, 3):  # found, locked, checkpointed
            faults(home, f"state {nth} {code} before")
            with pytest.raises(CudaError, match=f"error {code}"):
                suspend(driver, program)
            assert driver.state(program.pid) is State.RUNNING
        for nth in (1, 2, 3, 4):  # checkpointed, restored, locked, running
            found = suspend(driver, program)
            faults(home, f"state {nth} {code} before")
            with pytest.raises(CudaError, match=f"error {code}"):
                engine.resume(driver, found)
            engine.resume(driver, found)  # as `cryoci repair` does
        program.runs_on()


def test_a_failed_process_is_named(home: Path, driver: Driver, program: Program) -> None:
    faults(home, "checkpoint 1 719 failed")
    with pytest.raises(CheckpointError, match=r"error 719.*and then.*failed"):
        suspend(driver, program)
    with pytest.raises(UnsupportedError, match="has no way back"):
        suspend(driver, program)


def test_an_error_of_the_rollback_is_told_too(home: Path, driver: Driver, family: Program) -> None:
    faults(home, "checkpoint 2 999 before", "restore 1 304 before")
    with pytest.raises(CheckpointError, match=r"error 999.*and then.*error 304") as caught:
        suspend(driver, family)
    assert "cryoci repair" in (caught.value.hint or "")
    engine.resume(driver, tasks.cuda(driver, family.pid))
    family.runs_on()


def test_success_is_not_believed(home: Path, driver: Driver, program: Program) -> None:
    """A driver that reports success and leaves another state."""
    faults(home, "lock 1 0 before")
    with pytest.raises(CheckpointError, match="is running after the CUDA driver reported success of lock"):
        suspend(driver, program)
    program.runs_on()


def test_other_gpus_of_the_same_chip(driver: Driver, program: Program) -> None:
    (task,) = suspend(driver, program)
    old, new, other = (nvml.uuid_bytes(uuid) for uuid in UUIDS[:3])
    for wrong in ({old: new}, {old: other, new: new, other: old}):
        with pytest.raises(CudaError, match="error 1\\)"):  # not every GPU that it saw; another chip
            engine.resume(driver, [task], wrong)
    engine.resume(driver, [task], {old: new, new: old, other: other})
    assert program.wait(program.status()["count"] + 2)["uuid"] == new.hex()


def test_restore_without_memory_spoils_the_process(home: Path, driver: Driver, program: Program) -> None:
    """Why free memory is looked at before: the fake does as the driver (NVIDIA/cuda-checkpoint#44)."""
    (task,) = suspend(driver, program)
    fat = Program(home, "--mib", "64")
    try:
        for code in (2, 304, 304):
            with pytest.raises(CudaError, match=f"error {code}"):
                engine.resume(driver, [task])
    finally:
        fat.close()


def test_a_process_that_ends_meanwhile_is_no_error(driver: Driver, program: Program) -> None:
    found = suspend(driver, program)
    program.close()
    engine.resume(driver, found)


def test_nvml(home: Path, program: Program) -> None:
    with nvml.opened(str(build.library() / "libnvidia-ml.so.1")) as management:
        assert management.driver == "580.159.04"
        gpus = management.gpus()
        assert [(g.uuid, g.index, g.minor, g.mig) for g in gpus] == [
            (uuid, i, i, False) for i, uuid in enumerate(UUIDS[:3])
        ]
        assert management.used_by()[program.pid] == {UUIDS[0]: 1 << 20, UUIDS[1]: 0, UUIDS[2]: 0}
        assert gpus[0].free == build.MEMORY - (1 << 20)


def test_too_old(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKEGPU_CUDA", "12040")
    with pytest.raises(UnsupportedError, match=r"CUDA 12\.4\) cannot checkpoint") as caught:
        Driver(str(build.library() / "libcuda.so.1"))
    assert "install driver 570" in (caught.value.hint or "")
    with pytest.raises(CryociError, match="cannot be loaded"):
        Driver("libcuda-that-is-not-there.so.1")
