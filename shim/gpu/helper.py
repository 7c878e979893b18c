# SPDX-License-Identifier: Apache-2.0
"""The resident helper `cryoci-gpud`: pays the driver's initialization once, for all who follow.

Where persistence mode is off, a restore works only after cuInit, which takes seconds on a node of many GPUs. The
helper holds it for as long as it is used, and everything works without it. It listens on a unix socket for root of
the same pid namespace, one JSON object a packet, and ends when nobody has called for a while.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import cryoci
from cryoci.errors import ConflictError, CryociError
from cryoci.shim import paths
from cryoci.shim.gpu import halted
from cryoci.shim.gpu.cuda import Code, CudaError, Driver, State

IDLE = 300.0  # seconds
_START = 30.0  # seconds that cuInit may take
_LIMIT = 1 << 16
_PR_SET_NAME = 15
_REACHES = {
    "lock": State.LOCKED,
    "checkpoint": State.CHECKPOINTED,
    "restore": State.LOCKED,
    "unlock": State.RUNNING,
}
_OPERATIONS = ("restore_thread", "state", "lock", "checkpoint", "restore", "unlock")


def socket_path() -> str:
    """Where the helper listens."""
    return paths.run_directory() + "/gpud.sock"


class RemoteDriver(Driver):
    """The helper's driver. Where the helper has ended, this process' own library does the call."""

    def restore_thread(self, pid: int) -> int | None:
        value: int | None = self._ask("restore_thread", pid)
        return value

    def state(self, pid: int) -> State:
        return State(self._ask("state", pid))

    def lock(self, pid: int, timeout_ms: int = 0) -> None:
        self._ask("lock", pid, timeout_ms=timeout_ms)

    def checkpoint(self, pid: int) -> None:
        self._ask("checkpoint", pid)

    def restore(self, pid: int, pairs: Mapping[bytes, bytes] | None = None) -> None:
        self._ask("restore", pid, pairs=[[a.hex(), b.hex()] for a, b in (pairs or {}).items()])

    def unlock(self, pid: int) -> None:
        self._ask("unlock", pid)

    def _ask(self, operation: str, pid: int, **more: Any) -> Any:
        """One call; each takes a connection of its own, so that calls on several processes run together."""
        if operation != "restore_thread":
            halted.refuse(pid)
        try:
            with connect() as own:
                own.send(json.dumps({"operation": operation, "pid": pid, **more}).encode())
                raw = own.recv(_LIMIT)
            answer = json.loads(raw) if raw else None
        except (OSError, ValueError):
            answer = None
        if answer is None:  # it is gone: nothing was done, or the state says what was
            return self._local(operation, pid, more)
        if "code" in answer:
            raise CudaError(str(answer["verb"]), pid, int(answer["code"]), str(answer["text"]))
        return answer["value"]

    def _local(self, operation: str, pid: int, more: dict[str, Any]) -> Any:
        own = Driver()
        if operation in _REACHES and own.state(pid) is _REACHES[operation]:
            return None  # the helper had still done it
        if operation == "restore":
            own.init()
        try:
            return perform(own, {"operation": operation, "pid": pid, **more})
        except CudaError as e:
            # the helper's call went on in the driver: ours came behind it, and found it done
            if e.code == Code.ILLEGAL_STATE and own.state(pid) is _REACHES.get(operation):
                return None
            raise


def perform(driver: Driver, asked: dict[str, Any]) -> Any:
    """Do one request. Raises CudaError; ValueError, KeyError or TypeError for what is no request."""
    operation, pid = str(asked["operation"]), int(asked["pid"])
    if operation not in _OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}")
    if operation == "lock":
        return driver.lock(pid, int(asked.get("timeout_ms", 0)))
    if operation == "restore":
        pairs = {bytes.fromhex(a): bytes.fromhex(b) for a, b in asked.get("pairs", ())}
        return driver.restore(pid, pairs or None)
    return getattr(driver, operation)(pid)


def connect() -> socket.socket:
    """A connection to the running helper. Raises OSError without one."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        made.connect(socket_path())
    except BaseException:
        made.close()
        raise
    return made


def open_driver(*, persistent: bool) -> Driver:
    """The driver to use: the helper's where it runs or is needed (no persistence mode), else this process' own.

    Raises what Driver raises. A helper that does not start costs its start, nothing else.
    """
    if not persistent:
        start()
    if running():
        return RemoteDriver()
    own = Driver()
    if not persistent:
        own.init()
    return own


def running() -> bool:
    """Does a helper listen?"""
    try:
        connect().close()
    except OSError:
        return False
    return True


def start() -> None:
    """Start the helper, unless it runs, and wait until it listens; returns also when it does not come up."""
    if running():
        return
    root = os.path.dirname(os.path.dirname(os.path.abspath(cryoci.__file__)))
    code = f"import sys; sys.path.append({root!r}); from cryoci.shim.gpu.helper import serve; serve()"
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", code],
        stdin=null,
        stdout=null,
        stderr=null,
        start_new_session=True,
        cwd="/",
    )
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None and not running():
        time.sleep(0.02)


def serve(idle: float = IDLE) -> None:
    """Run the helper until it is idle for so long. Raises ConflictError when another one runs, CudaError."""
    path = socket_path()
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"cryoci-gpud", 0, 0, 0)  # what ps shows
    driver = Driver()
    driver.init()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if running():
        raise ConflictError(f"another helper listens on {path}")
    try:
        os.unlink(path)  # of one that was killed
    except FileNotFoundError:
        pass
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(64)
    listener.settimeout(idle)
    active = [0]
    guard = threading.Lock()

    def answer(peer: socket.socket) -> None:
        try:
            _answer(driver, peer)
        finally:
            with guard:
                active[0] -= 1

    while True:
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            with guard:
                if active[0]:  # an operation of the driver takes as long as it takes
                    continue
            break
        if not _trusted(peer):
            peer.close()
            continue
        with guard:
            active[0] += 1
        threading.Thread(target=answer, args=(peer,), daemon=True).start()
    os.unlink(path)


def _answer(driver: Driver, peer: socket.socket) -> None:
    with peer:
        try:
            raw = peer.recv(_LIMIT)
            if not raw:
                return
            answer: dict[str, Any] = {"value": perform(driver, json.loads(raw))}
        except CudaError as e:
            answer = {"verb": e.verb, "code": e.code, "text": e.text}
        except (ValueError, KeyError, TypeError, CryociError) as e:
            answer = {"verb": "understand a request for", "code": 1, "text": f"{type(e).__name__}: {e}"}
        try:
            peer.send(json.dumps(answer).encode())
        except OSError:
            pass  # the caller was killed; the driver has done its work


def _trusted(peer: socket.socket) -> bool:
    """Is the caller root of this pid namespace? Its pids would be others' elsewhere."""
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        return uid == 0 and os.readlink(f"/proc/{pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    except OSError:
        return False
