# SPDX-License-Identifier: Apache-2.0
"""What `cryoci debug` has of the GPU: each CUDA process' state, also where the driver never answers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cryoci.shim.gpu import states
from cryoci.shim.gpu.cuda import Driver
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the driver serves root only")


def told(program: Program, seconds: float = 10) -> dict[str, Any]:
    return next(one for one in states.ask(program.pid, seconds) if one["pid"] == program.pid)


def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "devices").write_text(build.devices(UUIDS[:1]))
    monkeypatch.setenv("FAKEGPU_HOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build.library()))
    program = Program(tmp_path, "--mib", "1")
    try:
        assert told(program)["state"] == "running"
        driver = Driver(str(build.library() / "libcuda.so.1"))
        driver.lock(program.pid)
        assert told(program)["state"] == "locked"
        driver.unlock(program.pid)
        for count in tmp_path.glob("count.*"):
            count.unlink()
        (tmp_path / "faults").write_text("state 1 304 before\n")
        assert "304" in told(program)["error"]
        slow = tmp_path / "python"  # as the driver does while a coupled process is locked
        slow.write_text("#!/bin/sh\nexec sleep 30\n")
        slow.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(slow))
        began = time.monotonic()
        assert "no answer within 0.2 s" in told(program, 0.2)["error"]
        assert time.monotonic() - began < 5
    finally:
        program.close()
