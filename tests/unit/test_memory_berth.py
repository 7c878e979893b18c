# SPDX-License-Identifier: Apache-2.0
"""shim/memory/berth.py: an instruction that harms nothing, in a real process."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cryoci.shim.memory import berth, calls, find, freezer, inject, stand
from cryoci.shim.memory.inject import RIP
from cryoci.shim.record import Record

_GET_RSEQ = 0x420F
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86-64")


def read(address: int, size: int) -> bytes:
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def test_a_jump_to_itself_is_found_past_what_criu_writes_over() -> None:
    areas = stand.areas(os.getpid())
    at = berth.find(os.getpid(), areas)
    assert at is not None and read(at, 2) == b"\xeb\xfe"
    (start,) = (start for start, end, runs in areas if runs and start <= at < end)
    assert at - start >= 16
    assert berth.find(os.getpid(), [(start, end, False) for start, end, _ in areas]) is None


@pytest.mark.parametrize("loop", [0x1234, None])
def test_registers_of_a_thread_there(loop: int | None) -> None:
    """A jump where there is one, else a call of pause(2); in neither is it in a call that the kernel would restart."""
    before = list(range(100, 127))
    after = berth.registers(before, loop, os.getpid())
    changed = {place for place in range(27) if after[place] != before[place]}
    assert after[15] == (1 << 64) - 1
    if loop is None:
        assert changed == {10, 15, 16} and after[10] == 34 and read(after[16], 2) == b"\x0f\x05"
    else:
        assert changed == {15, 16} and after[16] == loop


@dataclass
class Child:
    """A process that counts in memory which it shares with this one, and has room for 64 bytes at `room`."""

    pid: int
    shared: mmap.mmap
    room: int

    @property
    def count(self) -> int:
        return int.from_bytes(self.shared[:8], "little")

    def counts(self) -> bool:
        before, end = self.count, time.monotonic() + 5
        while self.count == before and time.monotonic() < end:
            time.sleep(0.001)
        return self.count > before

    def stop(self) -> None:
        freezer.stop([self.pid])
        freezer.await_stopped([self.pid])

    def put(self, address: int, data: bytes) -> None:
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)


@pytest.fixture
def child() -> Iterator[Child]:
    shared = mmap.mmap(-1, 4096)
    private = ctypes.create_string_buffer(128)
    pid = os.fork()
    if pid == 0:
        at = 0
        while True:
            at += 1
            shared[:8] = at.to_bytes(8, "little")
            time.sleep(0.0005)
    yield Child(pid, shared, ctypes.addressof(private) + 31 & ~31)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    shared.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="records are root's")
@pytest.mark.parametrize("has", ["a jump to itself", "none"])
def test_a_process_that_runs_at_its_berth_runs_nothing(
    child: Child, has: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when CRIU is killed: it runs before it was put back. It stands still, and goes on afterwards."""
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path))
    record = Record(None, "web")
    record.make()
    if has == "none":
        monkeypatch.setattr(berth, "find", lambda pid, areas: None)
    assert child.counts()
    child.stop()
    stand.note(record, [child.pid], len(find.status(os.getpid())["NSpid"].split()))
    seen = child.count
    freezer.proceed([child.pid])
    while find.states(child.pid) <= {"T", "t"}:
        time.sleep(0.001)
    time.sleep(0.05)
    assert child.count == seen
    with open(f"/proc/{child.pid}/syscall") as f:
        assert f.read().split()[0] == ("34" if has == "none" else "running")
    child.stop()
    stand.put_back(record, child.pid)
    assert child.count == seen
    freezer.proceed([child.pid])
    assert child.counts()


@pytest.mark.parametrize(
    ("before", "size", "aborts"),
    [(0, 1, True), (8, 16, True), (0, 0, False), (16, 16, False), (-1, 16, False), (None, 0, False)],
)
def test_a_restartable_sequence_is_left_by_its_abort_handler(
    child: Child, before: int | None, size: int, aborts: bool
) -> None:
    """As the kernel would do it (kernel/rseq.c, in_rseq_cs). `before`: so many bytes of the sequence have run."""
    child.stop()
    inject.seize(child.pid)
    try:
        registers = inject.registers_of(child.pid)
        known = ctypes.create_string_buffer(24)
        if calls.ptrace(_GET_RSEQ, child.pid, 24, known) == 0 or not any(known.raw[:8]):
            pytest.skip("this C library registers no rseq")
        where = int.from_bytes(known.raw[:8], "little") + 8  # struct rseq, rseq_cs
        if before is not None:
            described = struct.pack("<IIQQQ", 0, 0, registers[RIP] - before, size, 0x1234000)
            child.put(child.room, described)
        child.put(where, (child.room if before is not None else 0).to_bytes(8, "little"))
        after = berth.outside_of_rseq(child.pid, child.pid, registers)
        assert after == [0x1234000 if aborts and n == RIP else one for n, one in enumerate(registers)]
        child.put(where, (16).to_bytes(8, "little"))  # memory that is away
        assert berth.outside_of_rseq(child.pid, child.pid, registers) == registers
        child.put(where, bytes(8))
    finally:
        inject.release(child.pid)
