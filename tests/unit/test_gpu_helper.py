# SPDX-License-Identifier: Apache-2.0
"""The resident helper: the driver's functions through its socket, and without it when it is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import ConflictError
from cryoci.shim.gpu import engine, helper, tasks
from cryoci.shim.gpu.cuda import CudaError, Driver, State
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the helper serves root only")
_SERVE = "import sys; from cryoci.shim.gpu import helper; helper.serve(float(sys.argv[1]))"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "devices").write_text(build.devices(UUIDS[:1]))
    monkeypatch.setenv("FAKEGPU_HOME", str(tmp_path))
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    # Where the tests' own process, and the helper that it starts, load the driver from.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build.library()))
    library = str(build.library() / "libcuda.so.1")
    monkeypatch.setattr(Driver.__init__, "__defaults__", (library,))
    return tmp_path


@pytest.fixture
def program(home: Path) -> Iterator[Program]:
    made = Program(home, "--mib", "1")
    yield made
    made.close()


@pytest.fixture
def server(home: Path) -> Iterator[int]:
    """A helper that `start` has started; its pid."""
    helper.start()
    pid = _owner()
    assert Path(f"/proc/{pid}/comm").read_text() == "cryoci-gpud\n"
    yield pid
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _owner() -> int:
    with helper.connect() as peer:
        raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(raw[:4], sys.byteorder)


def test_a_round_through_the_helper(program: Program, server: int) -> None:
    driver = helper.open_driver(persistent=True)
    assert isinstance(driver, helper.RemoteDriver)
    assert driver.restore_thread(os.getpid()) is None
    found = engine.suspend(driver, lambda: tasks.cuda(driver, program.pid), lock_ms=1000)
    assert driver.state(program.pid) is State.CHECKPOINTED
    engine.resume(driver, found)
    program.runs_on()


def test_errors_come_through(program: Program, server: int) -> None:
    driver = helper.open_driver(persistent=True)
    with pytest.raises(CudaError, match=r"could not unlock.*error 401") as caught:
        driver.unlock(program.pid)
    assert (caught.value.verb, caught.value.pid, caught.value.code) == ("unlock", program.pid, 401)


def test_the_helper_is_killed_in_the_middle(home: Path, program: Program, server: int) -> None:
    """Before an operation, or after the driver has done it: the caller's own library does the rest."""
    driver = helper.open_driver(persistent=True)
    first = True
    for mode in ("die-before", "die-after"):
        for operation in ("lock", "checkpoint", "restore", "unlock"):
            while not first and helper.running():  # the killed one is still dying
                time.sleep(0.01)
            first = False
            helper.start()
            for count in home.glob("count.*"):
                count.unlink()
            (home / "faults").write_text(f"{operation} 1 0 {mode}\n")
            getattr(driver, operation)(program.pid)
            (home / "faults").unlink()
        assert driver.state(program.pid) is State.RUNNING
        program.runs_on()


@pytest.mark.parametrize(("code", "after", "fine"), [(401, 2, True), (401, 1, False), (2, 2, False)])
def test_the_killed_helpers_call_goes_on_in_the_driver(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int, fine: bool
) -> None:
    """As the real one does: the caller's own call waits behind it, and is told that there is nothing to do."""
    states = [State.LOCKED, State(after)]

    class Busy:
        def state(self, pid: int) -> State:
            return states.pop(0)

        def checkpoint(self, pid: int) -> None:
            raise CudaError("checkpoint", pid, code, "no")

    driver = helper.RemoteDriver(str(build.library() / "libcuda.so.1"))
    monkeypatch.setattr(helper, "Driver", Busy)
    if fine:
        driver.checkpoint(os.getpid())  # no helper listens
        assert states == []
    else:
        with pytest.raises(CudaError, match=f"error {code}"):
            driver.checkpoint(os.getpid())


def test_started_on_demand_only_without_persistence(home: Path) -> None:
    assert not isinstance(helper.open_driver(persistent=True), helper.RemoteDriver)
    assert not helper.running()
    assert isinstance(helper.open_driver(persistent=False), helper.RemoteDriver)
    os.kill(_owner(), signal.SIGKILL)


def test_one_at_a_time_and_idle_end(home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _SERVE, "1.0"])
    end = time.monotonic() + 10
    while not helper.running() and time.monotonic() < end:
        time.sleep(0.02)
    mode = os.stat(helper.socket_path()).st_mode
    assert mode & 0o077 == 0
    with pytest.raises(ConflictError, match="another helper"):
        helper.serve()
    assert process.wait(10) == 0
    assert not os.path.exists(helper.socket_path())


@pytest.mark.parametrize(
    "raw", [b"x", b"[]", b"{}", b'{"operation": "init", "pid": 1}', b'{"operation": "lock", "pid": []}']
)
def test_nonsense_is_answered_and_harms_nothing(server: int, raw: bytes) -> None:
    with helper.connect() as peer:
        peer.send(raw)
        assert "understand" in json.loads(peer.recv(1 << 16))["verb"]
    assert helper.running()


def test_others_are_refused(server: int) -> None:
    """The socket is root's, and what got through all the same is cut off: uid, and the pid namespace."""
    code = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    s.connect(sys.argv[1])
    s.send(b"{}")
    print("answered" if s.recv(100) else "cut off")
except PermissionError:
    print("no way in")
except ConnectionError:
    print("cut off")
"""

    path = Path(helper.socket_path())

    def ask(uid: int, *before: str) -> str:
        argv = [*before, "/usr/bin/python3", "-IS", "-c", code, path.name, str(uid)]
        return subprocess.run(
            argv, capture_output=True, check=True, text=True, cwd=path.parent
        ).stdout.strip()

    assert ask(0) == "answered"
    assert ask(0, "unshare", "--pid", "--fork") == "cut off"
    assert ask(65534) == "no way in"
    path.parent.chmod(0o711)
    assert ask(65534) == "no way in"  # by the socket's own mode
    path.chmod(0o777)
    assert ask(65534) == "cut off"
    assert helper.running()
