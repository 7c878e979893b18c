# SPDX-License-Identifier: Apache-2.0
"""Memory of another process faulted in from outside, while it maps it: nothing in it changes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.shim.gpu import prefault
from cryoci.shim.memory import calls

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="another process' memory needs the right to ptrace"
)

MIB = 1 << 20
# "map MIB": a new area, whose address it says. "write": a word of its address into each page, in the way of who
# faults them in. "check": how many pages do not hold what was written.
_PROGRAM = """
import ctypes, mmap, struct, sys
area = None
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "map":
        area = mmap.mmap(-1, int(words[0]) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
    elif verb == "write":
        for at in range(0, len(area), 4096):
            struct.pack_into("Q", area, at, at + 1)
        print("done", flush=True)
    elif verb == "check":
        wrong = (area[at:at + 4096] != struct.pack("Q", at + 1) + bytes(4088) for at in range(0, len(area), 4096))
        print(sum(wrong), flush=True)
"""


class Other:
    """The other process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def say(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, words: str) -> str:
        self.say(words)
        return self.hear()

    def resident(self) -> int:
        """Bytes of it in memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * calls.PAGE


@pytest.fixture
def other() -> Iterator[Other]:
    made = Other()
    made.ask("map 1")  # it has started then
    yield made
    made.process.kill()
    made.process.communicate()


def settled(other: Other, wanted: int) -> int:
    """Bytes in memory once they are `wanted`, or after five seconds."""
    end = time.monotonic() + 5
    while other.resident() < wanted and time.monotonic() < end:
        time.sleep(0.01)
    return other.resident()


def test_a_touch_writes_nothing(other: Other) -> None:
    address = int(other.ask("map 8"))
    before = other.resident()
    assert calls.touch(other.pid, address + 4 * MIB)
    assert 4 * MIB <= other.resident() - before < 5 * MIB
    assert other.ask("write") == "done"
    assert calls.touch(other.pid, address)
    assert calls.touch(other.pid, address + 4 * MIB)
    assert other.ask("check") == "0"
    assert calls.touch(other.pid, address + 8 * MIB - calls.PAGE)  # over the end of what is mapped
    assert other.ask("check") == "0"


def test_a_touch_of_a_process_that_is_gone(other: Other) -> None:
    other.process.kill()
    other.process.wait()
    assert not calls.touch(other.pid, 1 << 30)


def test_what_is_mapped_meanwhile_is_faulted_in(other: Other) -> None:
    other.ask("map 64")  # there before: left as it is
    before = other.resident()
    with prefault.ahead(other.pid, 128 * MIB, threads=2):
        other.say("map 128")
        other.hear()
        assert settled(other, before + 128 * MIB) - before >= 128 * MIB
    assert other.resident() - before < 136 * MIB


def test_its_owner_writes_at_the_same_time(other: Other) -> None:
    with prefault.ahead(other.pid, 256 * MIB, threads=2):
        other.ask("map 256")
        assert other.ask("write") == "done"
    assert other.ask("check") == "0"


@pytest.mark.parametrize(
    ("most", "threads"),
    [(128 * MIB, 2), (8 * MIB, 2), (2048 * MIB, 0)],
    ids=["larger", "small", "no threads"],
)
def test_what_is_left_alone(other: Other, most: int, threads: int) -> None:
    """An area larger than what the driver can want; a process with little; no thread to spare."""
    before = other.resident()
    with prefault.ahead(other.pid, most, threads):
        other.ask("map 1024")
        time.sleep(0.2)
    assert other.resident() - before < 8 * MIB


def test_it_ends_with_the_process(other: Other) -> None:
    with prefault.ahead(other.pid, 256 * MIB, threads=2):
        other.ask("map 256")
        other.process.kill()
        other.process.wait()
    assert prefault.areas(other.pid) == []


def test_an_error_inside_goes_on_up(other: Other) -> None:
    with pytest.raises(ZeroDivisionError), prefault.ahead(other.pid, 256 * MIB, threads=2):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("now", "before", "wanted"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 30)], [(10, 20)], [(0, 10), (20, 30)]),  # grown at both ends
        ([(5, 15)], [(0, 10)], [(10, 15)]),
        ([(0, 5), (20, 40)], [(0, 10), (15, 30)], [(30, 40)]),
        ([(0, 10)], [(10, 20)], [(0, 10)]),
    ],
)
def test_fresh(
    now: list[prefault.Range], before: list[prefault.Range], wanted: list[prefault.Range]
) -> None:
    assert prefault.fresh(now, before) == wanted
