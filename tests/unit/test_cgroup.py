# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cryoci.shim import cgroup

_HOME = Path("/sys/fs/cgroup")
# Its first thread ends; the other one goes on until it is told.
_LEADERLESS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
print(flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not (_HOME / "cgroup.controllers").exists() or not os.access(_HOME, os.W_OK),
    reason="makes a cgroup: needs root and cgroup v2 at /sys/fs/cgroup",
)
def test_a_process_without_its_first_thread_is_still_there() -> None:
    name = f"/cryoci-test-{os.getpid()}"
    (_HOME / name[1:]).mkdir()
    try:
        assert not cgroup.populated(name)
        process = subprocess.Popen(
            [sys.executable, "-c", _LEADERLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdin is not None
        (_HOME / name[1:] / "cgroup.procs").write_text(str(process.pid))
        assert cgroup.path_of(process.pid) == name
        assert process.stdout.readline() == b"\n"
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert cgroup.populated(name)
        process.stdin.close()
        process.wait()
        assert not cgroup.populated(name)
    finally:
        (_HOME / name[1:]).rmdir()


def test_no_cgroup() -> None:
    assert not cgroup.populated(None)
    assert not cgroup.populated("/cryoci-test-that-is-not-there")
