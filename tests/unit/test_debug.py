# SPDX-License-Identifier: Apache-2.0
"""Traces, structured logs, the debug bundle, and that no secret is in any of them."""

from __future__ import annotations

import json
import socket
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from cryoci import command, redact, trace
from cryoci.cli import main
from cryoci.errors import NotFoundError, ToolError
from cryoci.shim import attempt, debug
from cryoci.shim.record import Record

LOGS = Path(__file__).parents[1] / "fixtures" / "criu-logs"
SECRET = "hunter2"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["a", "--password", SECRET, "b"], ["a", "--password", redact.GONE, "b"]),
        (["a", f"--api-key={SECRET}"], ["a", f"--api-key={redact.GONE}"]),
        (["-e", f"X={SECRET}", "-e", "PATH=/bin"], ["-e", f"X={redact.GONE}", "-e", "PATH=/bin"]),
        ([f"https://u:{SECRET}@host/x"], [f"https://{redact.GONE}@host/x"]),
        (["--password", "--next", "x"], ["--password", "--next", "x"]),
        (["runc", "--root", "/run/runc", "checkpoint"], ["runc", "--root", "/run/runc", "checkpoint"]),
    ],
)
def test_words(given: list[str], shown: list[str]) -> None:
    assert redact.words(given) == shown


def test_text_and_specification() -> None:
    for said in (
        f"DB_PASSWORD={SECRET} token: {SECRET}, x",
        f'{{"password": "{SECRET}", "x": 1}}',
        f"Authorization: Bearer {SECRET}",
        f"Proxy-Authorization: Basic {SECRET}==",
        f"eyJhbGciOiJIUzI1NiJ9.{SECRET}.{SECRET}",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    ):
        assert SECRET not in redact.text(said)
    spec = {
        "process": {
            "env": ["PATH=/bin", f"KEY={SECRET}", f"NVIDIA_TOKEN={SECRET}"],
            "args": ["x", "--token", SECRET],
        },
        "annotations": {"my/secret": SECRET, "io.cryoci.x": "kept"},
        "root": {"path": "rootfs"},
    }
    shown = redact.specification(spec)
    assert SECRET not in json.dumps(shown)
    assert shown["process"]["env"][0] == "PATH=/bin" and shown["annotations"]["io.cryoci.x"] == "kept"
    assert shown["root"] == spec["root"]


def test_a_hostile_log_costs_no_time() -> None:
    start = time.monotonic()
    redact.text("a" * (1 << 20))
    redact.text("password" * (1 << 15))
    assert time.monotonic() - start < 10


def test_log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    monkeypatch.setenv("CRYOCI_LOG", str(path))
    command.run(["true", "--password", SECRET])
    with pytest.raises(ToolError):
        command.run(["false"])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (
        first["event"] == "call"
        and first["status"] == 0
        and first["argv"] == ["true", "--password", redact.GONE]
    )
    assert second["status"] == 1 and second["seconds"] >= 0
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("CRYOCI_LOG", "/nowhere/at/all")
    command.run(["true"])


def test_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_LOG", "journald")
    monkeypatch.setattr(trace, "JOURNAL", str(tmp_path / "journal"))
    command.run(["true"])  # no journal: no harm
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        command.run(["true"])
        fields = dict(line.split("=", 1) for line in journal.recv(1 << 16).decode().splitlines())
    assert fields["SYSLOG_IDENTIFIER"] == "cryoci" and json.loads(fields["MESSAGE"])["argv"] == ["true"]


def test_verbose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "verbose", True)
    command.run(["sh", "-c", "exit 3"], check=False)
    said = capsys.readouterr().err
    assert said.startswith("+ ") and "status 3" in said and "sh -c 'exit 3'" in said
    monkeypatch.setattr(trace, "verbose", False)
    result = CliRunner().invoke(main.cli, ["--verbose", "list", "--help"])
    assert result.exit_code == 0 and trace.verbose


def test_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    spec = tmp_path / "config.json"
    spec.write_text(
        json.dumps({"process": {"env": [f"DB={SECRET}"]}, "annotations": {"org.criu.config": "/x"}})
    )
    (tmp_path / "config.json.cryoci-orig").write_text(json.dumps({"process": {"env": [f"DB={SECRET}"]}}))
    pid_file = tmp_path / "pid"
    pid_file.write_text(str(__import__("os").getpid()))
    record = Record(None, "c1234")
    record.save("/usr/sbin/runc", {"spec": str(spec), "pid_file": str(pid_file)}, "")
    attempt.keep(record, "dump", ["runc", "checkpoint", f"--token={SECRET}"], time.time(), 1, {"work": "/w"})
    record.keep_log("dump", str(LOGS / "file-locks.dump.log"))
    out = tmp_path / "d.tar.gz"
    names = debug.collect("c12", out)
    assert out.stat().st_mode & 0o777 == 0o600
    with tarfile.open(out) as tar:
        texts = {
            m.name.removeprefix("cryoci-debug/"): (tar.extractfile(m) or out.open("rb")).read() for m in tar
        }
    assert set(names) == set(texts)
    assert all(SECRET.encode() not in raw for name, raw in texts.items() if not name.endswith("/maps"))
    assert json.loads(texts["record/dump.log.cause.json"])["id"] == "file-locks"
    steps = json.loads(texts["record/dump.log.timeline.json"])
    assert steps and all(one["seconds"] > 0 for one in steps)
    tried = json.loads(texts["record/dump-attempt.log"])
    assert tried["status"] == 1 and f"DB_PASSWORD={redact.GONE}" in tried["environment"]
    assert b"+" in texts["config/changes.diff"] and b"org.criu.config" in texts["config/changes.diff"]
    assert {"doctor.json", "about.json", "config/before.json", "config/after.json", "proc/mountinfo"} <= set(
        texts
    )

    record.remove()  # the engine deleted it at once; what was tried is still there
    assert "record/dump-attempt.log" in debug.collect("c1234", out)
    for unknown in ("nobody", ""):
        with pytest.raises(NotFoundError):
            debug.collect(unknown, out)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
