# SPDX-License-Identifier: Apache-2.0
"""The logs of the last attempts on a container, by its name or id, and what is said when there are none."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cryoci import trace
from cryoci.cli.main import cli
from cryoci.errors import NotFoundError
from cryoci.shim import attempts, engines
from cryoci.shim.record import Record

LOGS = Path(__file__).parents[1] / "fixtures" / "criu-logs"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State of its own; podman knows `web` as c1234."""
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))

    def find(name: str) -> SimpleNamespace:
        if name != "web":
            raise NotFoundError(f"no container {name}")
        return SimpleNamespace(root=None, id="c1234")

    monkeypatch.setattr(engines, "find", find)
    return tmp_path


def keep(container: str, verb: str, log: str, age: float = 0) -> str:
    kept = Record(None, container).keep_log(verb, str(LOGS / log))
    assert kept is not None
    os.utime(kept, (os.stat(kept).st_mtime - age,) * 2)
    return kept


def test_by_name_by_id_and_by_its_beginning() -> None:
    dump = keep("c1234", "dump", "file-locks.dump.log", age=60)
    assert attempts.log("web") == attempts.log("c1234") == attempts.log("c12") == dump
    restore = keep("c1234", "restore", "port-taken.restore.log")
    assert attempts.log("web") == restore  # the last one
    keep("c1235", "dump", "file-locks.dump.log")
    with pytest.raises(NotFoundError, match="more than one container c12 "):
        attempts.log("c12")
    assert attempts.log("c1234") == restore


def test_what_is_known_is_listed(place: Path) -> None:
    with pytest.raises(NotFoundError) as e:
        attempts.directory("db")
    assert e.value.hint and "nothing is in" in e.value.hint
    for number in range(7):
        keep(f"c{number}aaa", "dump", "file-locks.dump.log", age=number * 3600)
    with pytest.raises(NotFoundError) as e:
        attempts.directory("db")
    assert e.value.hint and "c0aaa (dump " in e.value.hint and "c6aaa" not in e.value.hint
    Record(None, "new").make()
    with pytest.raises(NotFoundError, match="no log of CRIU"):
        attempts.log("new")


def test_explain_takes_a_container() -> None:
    keep("c1234", "dump", "file-locks.dump.log")
    result = CliRunner().invoke(cli, ["explain", "web"])
    assert result.exit_code == 1 and "--file-locks" in result.output and "dump.log" in result.output
    result = CliRunner().invoke(cli, ["explain", "/nowhere"])
    assert isinstance(result.exception, NotFoundError) and "name or id" in (result.exception.hint or "")


def test_verbose_says_the_runtime_and_a_log_that_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRYOCI_LOG", str(place / "none" / "x"))
    monkeypatch.setattr(trace, "verbose", True)
    monkeypatch.setattr(trace, "_complained", False)
    for _ in range(2):
        with trace.call(["/usr/bin/python3", "-IS", "/x/cryoci/shim/launcher.py", "state", "c1"]) as call:
            call.status = 0
    said = capsys.readouterr().err
    assert said.count("status 0  cryoci-runtime state c1\n") == 2
    assert said.count("nothing is logged: CRYOCI_LOG=") == 1
