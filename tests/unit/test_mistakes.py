# SPDX-License-Identifier: Apache-2.0
"""What a new user meets: the wrong user, a container that is not there, a port that is taken. One line, and a hint."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cryoci.cli import main
from cryoci.errors import ConfigError, ConflictError, CryociError, NotFoundError
from cryoci.ociimage import credentials
from cryoci.shim import engines
from cryoci.uses import guard_state, idle, share, share_turns
from cryoci.uses.guard_state import State
from cryoci.uses.share_member import Member
from tests.unit.live_runtime import LiveRuntime, stored


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    monkeypatch.setenv("CRYOCI_LIB", str(tmp_path / "lib"))
    with stored(tmp_path, monkeypatch) as made:
        yield made


def fails(*words: str) -> CryociError:
    error = CliRunner().invoke(main.cli, words).exception
    assert isinstance(error, CryociError), error
    assert error.hint and "\n" not in error.message, error
    return error


@pytest.mark.parametrize(("user", "hint"), [(1000, "use sudo"), (0, "who owns that file")])
def test_what_is_roots_is_said_to_be(
    user: int, hint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        raise PermissionError(13, "Permission denied", "/run/cryoci/share")

    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(sys, "argv", ["cryoci"])
    with pytest.raises(SystemExit):
        main.report(command)
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "cryoci: Permission denied: /run/cryoci/share" and hint in said[1] and len(said) == 2


@pytest.mark.parametrize(
    "words", [["ps"], ["park", "x"], ["swap", "x", "y"], ["unpark", "x"], ["restore", "x"]]
)
def test_others_than_root(words: list[str], live: LiveRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    error = fails(*words)
    assert "needs root" in error.message and error.hint == "use sudo"


def test_a_state_that_is_roots_is_not_left_out(live: LiveRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    State("web", "podman", None, "disk", 60.0, 2).save()

    def refused(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(guard_state, "read_json", refused)
    assert isinstance(CliRunner().invoke(main.cli, ["guard", "status"]).exception, PermissionError)


def test_a_guard_of_nothing_leaves_nothing(
    live: LiveRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(name: str, root: str | None = None) -> None:
        raise NotFoundError(f"no container {name}", hint="see `podman ps`")

    monkeypatch.setattr(engines, "find", nobody)
    assert isinstance(fails("guard", "nope"), NotFoundError)
    assert not (tmp_path / "lib/guard/nope").exists() and guard_state.every_state() == []
    State("was", "runc", None, "disk", 60.0, 2).save()
    fails("guard", "was")
    assert [state.name for state in guard_state.every_state()] == ["was"]


def test_nobody_is_parked_for_a_daemon_whose_port_is_taken() -> None:
    """The members do not exist: whoever looked for one would say so."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        members = [Member("a", "127.0.0.1", _free(), 80), Member("b", "127.0.0.1", port, 80)]
        with pytest.raises(
            ConflictError, match=rf"cannot listen on 127.0.0.1:{port} for b: Address already"
        ):
            asyncio.run(share.Share(members, share_turns.Options(), print).run())


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"token of Jupyter cannot be read: .*/none: No such file or directory"
    ):
        idle.servers(["lab"], ["lab=8888"], [f"lab={tmp_path}/none"])


def test_an_auth_file_of_another_user_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    file = tmp_path / "auth.json"
    file.write_text("{}")
    monkeypatch.setattr(credentials, "auth_files", lambda explicit: [explicit or file])
    monkeypatch.setattr(Path, "read_bytes", refused)
    assert credentials.find("registry.example", "a").source == "none"
    with pytest.raises(ConfigError, match="cannot read the auth file"):
        credentials.find("registry.example", "a", file)
