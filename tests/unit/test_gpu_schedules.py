# SPDX-License-Identifier: Apache-2.0
"""Random faults of the driver and of its caller: the container runs with its GPU memory intact, or can be repaired."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cryoci.shim.gpu import engine, tasks
from cryoci.shim.gpu.cuda import Driver, State
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the driver needs the right to ptrace")

_ROUND = """
import os, sys
sys.path.insert(0, sys.argv[3])
from cryoci.errors import CryociError
from cryoci.shim.gpu import engine, tasks
from cryoci.shim.gpu.cuda import Driver
driver, pid = Driver(sys.argv[1]), int(sys.argv[2])
try:
    found = engine.suspend(driver, lambda: tasks.cuda(driver, pid), lock_ms=2000)
    engine.resume(driver, found)
except CryociError:
    sys.exit(3)
"""
fault = st.tuples(
    st.sampled_from(["lock", "checkpoint", "restore", "unlock", "state", "thread"]),
    st.integers(1, 6),
    st.sampled_from([1, 2, 304, 401, 600, 719, 801, 999]),
    st.sampled_from(["before", "before", "after", "die-before", "die-after"]),
)


def test_100_random_schedules(tmp_path: Path) -> None:
    """One process family through them all: what one schedule lost, the next would find."""
    (tmp_path / "devices").write_text(build.devices(UUIDS[:1]))
    os.environ["FAKEGPU_HOME"] = str(tmp_path)
    library = str(build.library() / "libcuda.so.1")
    driver = Driver(library)
    family = Program(tmp_path, "--mib", "1", "--children", "2")
    ends: list[int] = []

    @settings(
        max_examples=100, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(fault, max_size=4))
    def run(schedule: list[tuple[str, int, int, str]]) -> None:
        for count in tmp_path.glob("count.*"):
            count.unlink()
        lines = "".join(f"{name} {nth} {code} {mode}\n" for name, nth, code, mode in schedule)
        (tmp_path / "faults").write_text(lines)
        root = str(Path(__file__).resolve().parents[2])
        done = subprocess.run(
            [sys.executable, "-c", _ROUND, library, str(family.pid), root], capture_output=True
        )
        assert done.returncode in (0, 3, -signal.SIGKILL), done.stderr.decode()
        ends.append(done.returncode)
        (tmp_path / "faults").unlink()
        found = tasks.cuda(driver, family.pid)
        assert len(found) == 3
        if done.returncode == -signal.SIGKILL or any(
            driver.state(t.pid) is not State.RUNNING for t in found
        ):
            engine.fence(driver, found, lock_ms=5000)  # what `cryoci repair` does
            engine.resume(driver, found)
        for child in (None, 0, 1):
            family.wait(family.status(child)["count"] + 2, child=child)

    try:
        for child in range(2):
            family.wait(1, child=child)
        run()
    finally:
        family.close()
        del os.environ["FAKEGPU_HOME"]
    assert {0, 3, -signal.SIGKILL} == set(ends)  # all three ends were met
