# SPDX-License-Identifier: Apache-2.0
"""What counts as use of a container: on real sockets and processes, and on the fake driver."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConfigError, UnsupportedError, UsageError
from cryoci.shim.gpu import nvml
from cryoci.uses import idle, idle_probe, idle_state
from cryoci.uses.idle_probe import Connection, Gpus, Jupyter, Watch
from cryoci.uses.idle_state import State
from tests.fakegpu import build
from tests.fakegpu.build import UUIDS, Program

root = pytest.mark.skipif(os.geteuid() != 0, reason="entering a network namespace needs root")


def test_kernels_of_jupyter() -> None:
    stamp = "1970-01-01T00:01:40.250000Z"
    said = [{"id": "a" * 99, "execution_state": "idle", "last_activity": stamp, "connections": 0},
            {"id": "b", "execution_state": "busy", "last_activity": stamp}]  # fmt: skip
    one, two = idle_probe.parse_kernels(json.dumps(said).encode())
    assert (len(one.id), one.busy, one.last) == (64, False, 100.0) and two.busy
    assert idle_probe.parse_kernels(b"[]") == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{}x", b"[1]", b'[{"id": "a"}]', b"[" * 100_000, b" " * (1 << 21),
     b'[{"id": "a", "execution_state": "idle", "last_activity": "yesterday"}]',
     b'[{"id": "a", "execution_state": "idle", "last_activity": 7}]'],
)  # fmt: skip
def test_what_is_no_answer_of_jupyter(body: bytes) -> None:
    with pytest.raises(UnsupportedError):
        idle_probe.parse_kernels(body)


def test_connections_within_a_container_are_no_use() -> None:
    kernel, server, client = ("127.0.0.1", 5001), ("127.0.0.1", 8888), ("10.0.0.9", 40000)
    inner = [Connection(1, 11, kernel, server, 9), Connection(2, 12, server, kernel, 9)]
    foreign = Connection(4, 14, ("10.0.0.2", 80), client, 5)
    out = Connection(3, 13, server, client, 7)
    assert idle_probe.outer([*inner, out, foreign], {11, 12, 13}) == [out]


@root
def test_bytes_on_a_connection_are_use() -> None:
    """The server is another process: what this one does at the other end is traffic."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n" \
           "c, _ = s.accept()\nwhile d := c.recv(10): c.send(d)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as server:
        assert server.stdout
        watch = Watch(ignored=frozenset({"cpu"}))
        port = int(server.stdout.readline())
        try:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.send(b"a")
                client.recv(1)
                assert watch.look(server.pid, Gpus()) == ""  # what was before the first look
                assert watch.look(server.pid, Gpus()) == ""
                client.send(b"bb")
                client.recv(2)
                assert "bytes in 1 connection" in watch.look(server.pid, Gpus())
                assert watch.look(server.pid, Gpus()) == ""
        finally:
            server.kill()


@root
def test_cpu_time_is_use() -> None:
    watch = Watch(ignored=frozenset({"traffic"}))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spins:
        try:
            assert watch.look(spins.pid, Gpus()) == ""
            time.sleep(0.5)
            assert watch.look(spins.pid, Gpus()).startswith("CPU ")
        finally:
            spins.kill()


@root
def test_work_of_a_gpu_is_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "devices").write_text(build.devices(UUIDS[:1]))
    monkeypatch.setenv("FAKEGPU_HOME", str(tmp_path))
    library = str(build.library() / "libnvidia-ml.so.1")
    watch = Watch(ignored=frozenset({"traffic"}))
    since = time.time()

    def look(program: Program) -> str:
        with nvml.opened(library) as management:
            return watch.look(program.pid, Gpus(management.busy(since), management.used_by()))

    rests = Program(tmp_path, "--mib", "1")
    works = Program(tmp_path, "--mib", "1", "--kernel-ms", "20")
    try:
        works.wait(10)
        assert look(rests) == ""
        assert look(works).startswith("GPU ")
        monkeypatch.setenv("FAKEGPU_NO_PROCESS_UTILIZATION", "1")
        assert look(rests).startswith("GPU ")  # nobody says whose work it is
    finally:
        rests.close()
        works.close()


def test_a_gpu_that_says_nothing_is_told() -> None:
    seen = Gpus({"GPU-a": nvml.Busy(None, None)}, {os.getpid(): {"GPU-a": 1}})
    with pytest.raises(UnsupportedError, match="does not say"):
        Watch(ignored=frozenset({"traffic"})).look(os.getpid(), seen)


def test_servers(tmp_path: Path) -> None:
    token = tmp_path / "t=x"
    token.write_text("secret")
    found = idle.servers(["a", "b"], ["a=1", "b=2"], [f"b={token}"])
    assert found == {"a": Jupyter(1), "b": Jupyter(2, token)}
    wrong: list[tuple[Any, Any]] = [(["c=1"], []), (["a"], []), (["a=0"], []), (["a=x"], []), ([], ["a=/t"])]
    for ports, tokens in wrong:
        with pytest.raises(UsageError):
            idle.servers(["a", "b"], ports, tokens)


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "token"
    for text in (None, "", "a\nb", "\x07", "é"):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError):
            idle_probe.read_token(file)
    file.write_text("secret\n")
    assert idle_probe.read_token(file) == "secret"


def test_state_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_state, "directory", lambda: tmp_path / "idle")
    assert idle_state.load("lab") is None and idle_state.every_state() == []
    state = State("lab", 1, 2, (3, 4), 900.0, used=5.0, why="GPU 7 %")
    state.save()
    assert idle_state.load("lab") == state and idle_state.every_state() == [state]
    (tmp_path / "idle" / "lab.json").write_text("{")
    assert idle_state.load("lab") is None
    with pytest.raises(UsageError):
        idle_state.load("../lab")
