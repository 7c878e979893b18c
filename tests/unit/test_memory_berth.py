# SPDX-License-Identifier: Apache-2.0
"""shim/memory/berth.py: an instruction that harms nothing, in a real process."""

from __future__ import annotations

import os
import platform

import pytest

from cryoci.shim.memory import berth, stand

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
