# SPDX-License-Identifier: Apache-2.0
"""Every refusal of docs/gpu.md before a checkpoint touches anything, on real processes of the fake driver."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConflictError, CryociError, SpaceError, UnsupportedError
from cryoci.shim import cgroup
from cryoci.shim.gpu import coupled, engine, helper, hold, moved, nvml, preflight, tasks
from cryoci.shim.gpu.cuda import Driver, State
from cryoci.shim.gpu.nvml import Gpu
from cryoci.shim.gpu.tasks import Task
from cryoci.shim.memory.meter import Meter
from cryoci.shim.record import Record
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the driver needs the right to ptrace")
GPU = Gpu(UUIDS[0], build.CHIP, 0, 0, "9.0", 64 << 20, 64 << 20)
_SEIZE, _DETACH = 0x4206, 17  # linux/ptrace.h


class Management:
    """NVML with what a node would say."""

    def __init__(self, driver: str = "580.159.04", mps: tuple[int, ...] = ()) -> None:
        self.driver = driver
        self._mps = mps

    def used_by(self, *, mps: bool = False) -> dict[int, dict[str, int]]:
        return {pid: {} for pid in self._mps} if mps else {}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    (tmp_path / "devices").write_text(build.devices(UUIDS[:1]))
    monkeypatch.setenv("FAKEGPU_HOME", str(tmp_path))
    return Driver(str(build.library() / "libcuda.so.1"))


@pytest.fixture
def program(driver: Driver, tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path, "--mib", "1")
    yield made
    made.close()


def started(code: str, *words: str) -> subprocess.Popen[bytes]:
    """A Python program that has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def check(driver: Driver, *pids: int, init: int = 0, gpu: Gpu = GPU, **management: Any) -> None:
    found = [tasks.look(pid) for pid in pids]
    preflight.check(Management(**management), driver, init or pids[0], found, [gpu])  # type: ignore[arg-type]


def refused(driver: Driver, program: Program, kind: type[CryociError], words: str, **more: Any) -> None:
    """The refusal says its cause and what to do, and nothing was done."""
    with pytest.raises(kind, match=words) as error:
        check(driver, program.pid, **more)
    assert error.value.hint
    assert driver.state(program.pid) is State.RUNNING


def test_nothing_is_wrong(driver: Driver, program: Program) -> None:
    check(driver, program.pid)
    program.runs_on()


def test_mig_and_mps(driver: Driver, program: Program) -> None:
    refused(driver, program, UnsupportedError, "split by MIG", gpu=dataclasses.replace(GPU, mig=True))
    refused(driver, program, UnsupportedError, "client of an MPS server", mps=(program.pid,))


def test_a_debugger(driver: Driver, program: Program) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(_SEIZE, program.pid, None, None) == 0
    try:
        refused(driver, program, ConflictError, f"traced by process {os.getpid()}")
    finally:
        libc.ptrace(0x4207, program.pid, None, None)  # PTRACE_INTERRUPT: only a stopped one is detached
        os.waitpid(program.pid, 0x40000000)  # __WALL
        assert libc.ptrace(_DETACH, program.pid, None, None) == 0
    check(driver, program.pid)
    program.runs_on()


def test_managed_memory(driver: Driver, tmp_path: Path) -> None:
    """A second mapping of the device; one is every context's own."""
    device = tmp_path / "dev/nvidia-uvm"
    device.parent.mkdir()
    device.write_bytes(bytes(2 * mmap.PAGESIZE))
    code = """
        import mmap, sys
        with open(sys.argv[1], "rb") as f:
            kept = [mmap.mmap(f.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)
                    for n in range(int(sys.argv[2]))]
        print("ready", flush=True)
        sys.stdin.read()
    """
    for count, fine in ((1, True), (2, False)):
        process = started(code, str(device), str(count))
        try:
            assert tasks.managed(process.pid) is not fine
            if not fine:
                with pytest.raises(UnsupportedError, match="managed") as error:
                    check(driver, process.pid)
                assert "cudaMalloc" in (error.value.hint or "")
        finally:
            process.communicate()


@pytest.mark.parametrize(("version", "fine"), [("580.159.04", False), ("610.57.04", True)])
def test_nccl_between_processes(driver: Driver, program: Program, version: str, fine: bool) -> None:
    """Known by the names of its threads; a process that speaks with nobody is no matter."""
    process = started("""
        import ctypes, sys
        ctypes.CDLL(None).prctl(15, b"NCCL Progress 0")
        print("ready", flush=True)
        sys.stdin.read()
    """)
    try:
        check(driver, process.pid)
        if fine:
            check_two(driver, process.pid, program.pid, version)
        else:
            with pytest.raises(UnsupportedError, match=f"processes {process.pid} speak NCCL") as error:
                check_two(driver, process.pid, program.pid, version)
            assert "610" in (error.value.hint or "")
    finally:
        process.communicate()


def test_tensors_of_another_process(
    driver: Driver, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells of them is in test_gpu_coupled.py; noted in gpu.dump, too, where a driver can do it."""
    other = started("import sys; print('ready', flush=True); sys.stdin.read()")
    monkeypatch.setattr(coupled, "tensors", lambda pid: 3 if pid == program.pid else 0)
    try:
        with pytest.raises(UnsupportedError, match=r"has sent PyTorch tensors .* use 3 of") as error:
            check_two(driver, program.pid, other.pid, "580.159.04")
        assert "610" in (error.value.hint or "")
        check_two(driver, program.pid, other.pid, "610.57.04")
        assert preflight.flags([tasks.look(other.pid), tasks.look(program.pid)])["ipc"]
        assert not preflight.flags([tasks.look(other.pid)])["ipc"]
    finally:
        other.communicate()


def check_two(driver: Driver, one: int, two: int, version: str) -> None:
    found = [tasks.look(one), tasks.look(two)]
    management: Any = Management(version)
    preflight.check(management, driver, one, found, [GPU])


def test_a_forked_child_with_the_gpus_devices(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_NVIDIA", (f"{tmp_path}/nvidia",))
    (tmp_path / "nvidia0").touch()
    process = started(
        """
        import os, sys
        device = open(sys.argv[1])
        child = os.fork()
        if child == 0:
            os.close(1)
            sys.stdin.read()
            os._exit(0)
        print("ready", flush=True)
        os.wait()
        """,
        str(tmp_path / "nvidia0"),
    )
    try:
        with pytest.raises(UnsupportedError, match="forked") as error:
            check(driver, process.pid)
        assert "forkserver" in (error.value.hint or "") and "590" in (error.value.hint or "")
    finally:
        process.communicate()


def test_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the driver, twice when the images go to memory as well; and the container's own limit."""
    held = [Task(1, 1, 1, "x", {UUIDS[0]: 100 << 20})]
    monkeypatch.setattr(preflight, "available_memory", lambda: 150 << 20)
    monkeypatch.setattr(cgroup, "memory_left", lambda pid: None)
    monkeypatch.setattr(preflight, "in_memory", lambda path: path == "/memory")
    preflight.check_host_memory(1, held, "/disk")
    with pytest.raises(SpaceError, match="which is memory too; 150 MiB are free") as error:
        preflight.check_host_memory(1, held, "/memory")
    assert "on a disk" in (error.value.hint or "")
    monkeypatch.setattr(preflight, "available_memory", lambda: 105 << 20)
    with pytest.raises(SpaceError, match="this node has 105 MiB") as error:
        preflight.check_host_memory(1, held, None)
    assert "free host memory" in (error.value.hint or "")
    monkeypatch.setattr(preflight, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(cgroup, "memory_left", lambda pid: 50 << 20)
    with pytest.raises(SpaceError, match="its memory limit leaves 50 MiB") as error:
        preflight.check_host_memory(1, held, None)
    assert "memory limit" in (error.value.hint or "")


def test_memory_on_its_way_is_told(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes, as they come and go: what bars are made of."""
    told: list[tuple[str, int, list[int]]] = []

    class Heard(Meter):
        def __init__(self, directory: str, phase: str, total: int) -> None:
            super().__init__(directory, phase, total)
            told.append((phase, total, []))

        def add(self, n: int) -> None:
            told[-1][2].append(n)

    monkeypatch.setattr(moved, "Meter", Heard)
    monkeypatch.setattr(moved, "_PERIOD", 0.001)
    size = 24 << 20
    for least in (size + 1, size):
        monkeypatch.setattr(moved, "LEAST", least)
        program = Program(tmp_path, "--mib", "24")
        held = [dataclasses.replace(tasks.look(program.pid), vram={UUIDS[0]: size})]
        try:
            with moved.told(str(tmp_path), "gpu-out", held):
                engine.suspend(driver, lambda: tasks.cuda(driver, program.pid), lock_ms=5000)  # noqa: B023
            with moved.told(str(tmp_path), "gpu-in", held):
                engine.resume(driver, held)
            program.runs_on()
        finally:
            program.close()
        if least > size:
            assert not told
    assert [(phase, total) for phase, total, _ in told] == [("gpu-out", size), ("gpu-in", size)]
    assert all(0.9 * size < sum(passed) <= size for _, _, passed in told)
    with moved.told(str(tmp_path), "gpu-in", held):
        pass  # of a process that is gone
    assert not (tmp_path / "memory-progress").exists()


@pytest.mark.parametrize(("cuda", "there"), [("13000", False), ("13040", True)])
def test_custom_storage_is_found_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str, there: bool
) -> None:
    (tmp_path / "devices").write_text(build.devices(UUIDS[:1]))
    for name, value in (("FAKEGPU_HOME", str(tmp_path)), ("FAKEGPU_CUDA", cuda)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    driver = Driver(str(build.library() / "libcuda.so.1"))
    assert driver.custom_storage is there
    monkeypatch.setattr(helper, "open_driver", lambda persistent: driver)
    library, opened = str(build.library() / "libnvidia-ml.so.1"), nvml.opened
    monkeypatch.setattr(nvml, "opened", lambda: opened(library))
    program = Program(tmp_path, "--mib", "1")
    record = Record(None, "custom")
    record.save("/usr/bin/runc", {}, "")
    try:
        held = hold.take(record, program.pid, "park", lock_seconds=5)
        assert held is not None and held.dump.flags["custom-storage"] is there
        held.dump.write(str(tmp_path))
        written = build.valid_dump((tmp_path / "gpu.dump").read_bytes())
        assert written["flags"] == dict.fromkeys(("nccl", "uvm", "ipc", "job"), False) | {
            "custom-storage": there
        }
        held.release()
        program.runs_on()
    finally:
        program.close()
