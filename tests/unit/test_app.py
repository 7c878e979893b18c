# SPDX-License-Identifier: Apache-2.0
"""App hooks: their grammar, and when they are done."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cryoci import durations
from cryoci.errors import CheckpointError, HookError, UsageError
from cryoci.shim import app, inside, untrusted
from cryoci.shim.engines.checkpoint import checkpoint
from cryoci.shim.engines.options import DumpOptions
from tests.unit.live_runtime import LiveRuntime, running

PRE, POST = "io.cryoci.pre-checkpoint", "io.cryoci.post-restore"
NOTED = {PRE: "exec: /bin/sleep-model --level 1", POST: "exec: /bin/wake-model"}
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="a checkpoint needs root")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with running(tmp_path, monkeypatch) as made:
        made.spec["annotations"] = dict(NOTED)
        yield made


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("500ms", 0.5), ("10m", 600), (" 1.5 h ", 5400), ("2d", 172800)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert durations.parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "-1s", "ten", "1w", "9" * 60, "nan", "1e3"])
def test_no_lengths_of_time(text: str) -> None:
    with pytest.raises(UsageError):
        durations.parse(text)


def test_annotations_say_steps_time_and_policy() -> None:
    noted = {
        PRE: "signal: SIGUSR1\n\n wait: 1s \nhttp: POST http://127.0.0.1:8000/sleep?level=1\nexec: sh -c 'a b'",
        f"{PRE}.timeout": "2m",
        f"{PRE}.on-failure": "ignore",
    }
    hooks = app.hooks("pre-checkpoint", noted, app.Choice())
    assert [(step.act, step.words) for step in hooks.steps] == [
        ("signal", ("USR1",)),
        ("wait", ("1s",)),
        ("http", ("POST", "http://127.0.0.1:8000/sleep?level=1")),
        ("exec", ("sh", "-c", "a b")),
    ]
    assert (hooks.timeout, hooks.ignore) == (120, True)
    assert app.hooks("post-restore", noted, app.Choice()).steps == ()


def test_flags_come_before_annotations() -> None:
    choice = app.Choice(pre_checkpoint=("exec: true",), timeout=5, on_failure="ignore")
    hooks = app.hooks("pre-checkpoint", NOTED, choice)
    assert [step.text for step in hooks.steps] == ["exec: true"]
    assert (hooks.timeout, hooks.ignore) == (5, True)
    assert [step.text for step in app.hooks("post-restore", NOTED, choice).steps] == [NOTED[POST]]
    assert app.hooks("pre-checkpoint", NOTED, app.Choice(off=True)).steps == ()


@pytest.mark.parametrize(
    "text",
    [
        "true", "exec:", "exec: 'a", "run: true", "signal: NOPE", "http: GET", "http: a b c", "wait: long",
        "http: GET http://10.0.0.1/", "http: GET http://metadata/", "http: GET https://127.0.0.1/",
        "http: GET file:///etc/shadow", "http: FETCH http://127.0.0.1/", "http: GET http://127.0.0.1:99999/",
        "http: GET http://127.0.0.1@10.0.0.1/", "exec: a\0b",
    ],
)  # fmt: skip
def test_what_is_no_step_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"pre-checkpoint|address|method|length|HTTP"):
        app.hooks("pre-checkpoint", {PRE: text}, app.Choice())


def test_a_bad_policy_and_too_many_steps() -> None:
    with pytest.raises(UsageError, match="on-failure"):
        app.hooks("pre-checkpoint", {PRE: "exec: a", f"{PRE}.on-failure": "panic"}, app.Choice())
    with pytest.raises(UsageError, match="33 steps"):
        app.hooks("pre-checkpoint", {PRE: "exec: a\n" * 33}, app.Choice())


def test_a_restored_container_keeps_its_hooks() -> None:
    spec: dict[str, Any] = {
        "process": {},
        "linux": {"namespaces": [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount")]},
        "annotations": {**NOTED, "io.cryoci.other": "x"},
    }
    assert untrusted.spec(spec)["annotations"] == NOTED


@root_only
def test_before_the_freeze_and_not_after_the_end(live: LiveRuntime, tmp_path: Path) -> None:
    with checkpoint(live.container(), tmp_path / "out", DumpOptions()) as done:
        pass
    assert live.verbs == ["exec", "pause", "checkpoint", "kill", "resume", "delete"]
    assert live.words("exec")[-3:] == ["/bin/sleep-model", "--level", "1"]
    assert "pre-checkpoint hooks" in done.seconds and done.warnings == []


@root_only
def test_left_running_it_wakes_up_once(live: LiveRuntime, tmp_path: Path) -> None:
    with checkpoint(live.container(), tmp_path / "out", DumpOptions(leave_running=True)):
        assert live.verbs == ["exec", "pause", "checkpoint", "resume", "exec"]
        assert live.words("exec")[-1] == "/bin/wake-model"
    with pytest.raises(OSError, match="full"):
        with checkpoint(live.container(), tmp_path / "two", DumpOptions(leave_running=True)):
            raise OSError(28, "full")
    assert live.verbs.count("exec") == 4


@root_only
def test_a_failing_step_stops_the_checkpoint(live: LiveRuntime, tmp_path: Path) -> None:
    live.wish(exec={"status": 3, "say": "model is busy"})
    with pytest.raises(
        HookError, match=r"pre-checkpoint hook of container web failed: .*model is busy"
    ) as caught:
        with checkpoint(live.container(), tmp_path / "out", DumpOptions()):
            pass
    assert "on-failure=ignore" in str(caught.value.hint)
    assert live.verbs == ["exec", "exec"]  # it may be half asleep: it is woken
    assert live.words("exec")[-1] == "/bin/wake-model"
    assert live.status == "running" and not (tmp_path / "out").exists()


@root_only
def test_a_failing_step_that_is_to_be_ignored_is_told(live: LiveRuntime, tmp_path: Path) -> None:
    live.wish(exec={"status": 3})
    live.spec["annotations"][f"{PRE}.on-failure"] = "ignore"
    with checkpoint(live.container(), tmp_path / "out", DumpOptions()) as done:
        pass
    assert len(done.warnings) == 1 and "status 3" in done.warnings[0]
    assert live.status == "gone"


@root_only
def test_a_failed_dump_wakes_it_up_after_the_thaw(live: LiveRuntime, tmp_path: Path) -> None:
    live.wish(checkpoint={"status": 1})
    with pytest.raises(CheckpointError):
        with checkpoint(live.container(), tmp_path / "out", DumpOptions()):
            pass
    assert live.verbs == ["exec", "pause", "checkpoint", "resume", "exec"]


@root_only
def test_a_step_that_takes_too_long_is_ended(live: LiveRuntime) -> None:
    live.wish(exec={"sleep": 60})
    started = time.monotonic()
    assert app.execute(live.container(), ("slow",), 0.5) == "it did not end within 0.5 s"
    assert time.monotonic() - started < 5


@root_only
def test_hooks_of_a_paused_container(live: LiveRuntime, tmp_path: Path) -> None:
    live.set_status("paused")
    with pytest.raises(HookError, match="paused"):
        with checkpoint(live.container(), tmp_path / "out", DumpOptions()):
            pass
    with checkpoint(live.container(), tmp_path / "out", DumpOptions(hooks=app.Choice(off=True))):
        pass
    assert "exec" not in live.verbs


class Model(BaseHTTPRequestHandler):
    """A server with a good and a bad answer."""

    def do_POST(self) -> None:
        self.send_response(200 if self.path == "/sleep?level=1" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@root_only
def test_http_is_asked_in_the_network_of_a_process() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, pid = f"http://127.0.0.1:{server.server_port}", os.getpid()
        assert inside.request(pid, "POST", f"{url}/sleep?level=1", 5) == ""
        assert inside.request(pid, "POST", f"{url}/other", 5) == "the answer was 503 Service Unavailable"
        assert inside.answers(pid, server.server_port, 5)
        server.shutdown()
        port = server.server_port
    assert "refused" in inside.request(pid, "POST", f"http://127.0.0.1:{port}/sleep", 5)
    assert not inside.answers(pid, port, 5)


@root_only
def test_an_answer_that_comes_byte_by_byte_is_no_answer() -> None:
    """Each byte is within the time of a socket; the whole is not, and the connection does not stay."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def drip() -> None:
            client, _ = listening.accept()
            with client:
                client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                with contextlib.suppress(OSError):
                    while not ended.wait(0.05):
                        client.sendall(b"x")
            ended.set()

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert inside.request(os.getpid(), "GET", url, 0.3) == "no answer within 0.3 s"
        assert ended.wait(5)
