# SPDX-License-Identifier: Apache-2.0
"""Processes of a container, and the lock between processes of cryoci."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from cryoci.shim.engines import processes


def test_private_memory_counts_descendants() -> None:
    code = "import os,sys\nx=bytearray(24<<20)\n{}\nprint('up',flush=True)\nsys.stdin.read()"
    fork = (
        "if os.fork() == 0:\n  y=bytearray(24<<20)\n  print('up',flush=True); sys.stdin.read(); os._exit(0)"
    )
    argv = [sys.executable, "-c", code.format(fork)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline(), process.stdout.readline()
        assert 48 << 20 < processes.private_memory(process.pid) < 200 << 20
        process.kill()
    assert processes.private_memory(process.pid) == 0
    assert processes.private_memory(0) == processes.private_memory(-1) == 0


def test_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with processes.lock(path) as first:
        assert first
        with processes.lock(path) as second:
            assert not second
        assert path.exists(), "who did not get it does not remove it"
    assert not path.exists()
    with processes.lock(path) as again:
        assert again


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import os,sys;from pathlib import Path;from cryoci.shim.engines import processes\n"
        f"with processes.lock(Path({str(path)!r})): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.exists()
    with processes.lock(path) as got:
        assert got


def _contend(path: str, counter: str, until: float) -> None:
    while time.monotonic() < until:
        with processes.lock(Path(path)) as got:
            if got:
                fd = os.open(counter, os.O_CREAT | os.O_EXCL)  # fails when two hold the lock
                os.close(fd)
                os.unlink(counter)


def test_never_two_holders(tmp_path: Path) -> None:
    """The lock file is removed while it is held: who opened it before must not count the dead file as held."""
    fork = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "lock"), str(tmp_path / "inside"), time.monotonic() + 1.0)
    workers = [fork.Process(target=_contend, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
