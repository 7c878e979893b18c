# SPDX-License-Identifier: Apache-2.0
"""The command line of checkpoint and restore, with a fake runtime below it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cryoci.cli import criu_options, main, signals
from cryoci.errors import ConfigError, CryociError, UsageError
from cryoci.shim import paths
from cryoci.shim.criu.options import CriuOptions
from tests.unit.live_runtime import LiveRuntime, stored

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="checkpoint and restore need root")


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with stored(tmp_path, monkeypatch) as made:
        yield made


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main.cli, list(words))


def fails(*words: str) -> CryociError:
    error = invoke(*words).exception
    assert isinstance(error, CryociError), error
    return error


def run_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cryoci", *words])
    with pytest.raises(SystemExit) as caught:
        main.main()
    return int(caught.value.code or 0)


def test_help_names_every_verb_and_loads_none() -> None:
    code = (
        "import sys; from cryoci.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith(('cryoci.shim', 'cryoci.ociimage', 'oras', 'rich'))])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {verb} " in said for verb in main.VERBS)
    assert said.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output


@pytest.mark.parametrize(
    "words",
    [
        ("nothing",),
        ("checkpoint",),
        ("checkpoint", "a", "b"),
        ("restore", "x", "--allow", "all"),
        ("--what",),
    ],
)
def test_usage(words: tuple[str, ...]) -> None:
    assert invoke(*words).exit_code == 2


def test_errors_have_a_hint_and_a_status(
    live: LiveRuntime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live.set_status("gone")
    assert run_main(monkeypatch, "checkpoint", "nobody") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("cryoci: no container nobody is known to podman, runc and crun\nhint: see ")
    assert run_main(monkeypatch, "checkpoint", "web", "-o", "x.tar") == 2
    assert "writes directories and images, not archives" in capsys.readouterr().err
    assert run_main(monkeypatch, "--no") == 2


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_ends_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(main.cli, "main", raises)
    out = os.dup(1)
    try:
        assert run_main(monkeypatch) == status
    finally:
        os.dup2(out, 1)
        os.close(out)


# -- options of CRIU


def test_take_leaves_the_rest() -> None:
    values = {"tcp_established": True, "file_locks": False, "external": (), "timeout": None, "name": "x"}
    values["ghost_limit"] = "2M"
    assert criu_options.take(values) == CriuOptions(tcp_established=True, ghost_limit=2 << 20)
    assert values == {"name": "x"}


@pytest.mark.parametrize("values", [{"ghost_limit": "much"}, {"timeout": 0}, {"external": ("a b",)}])
def test_take_checks(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--"):
        criu_options.take(values)


def test_signals_unwind() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        with signals.unwinding():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


# -- checkpoint and restore


@root_only
def test_to_a_directory_and_back(live: LiveRuntime, tmp_path: Path) -> None:
    target = tmp_path / "out"
    result = invoke("checkpoint", "web", "-o", f"{target}/", "--tcp-established", "-R", "--timeout", "60")
    assert result.exit_code == 0, result.exception
    assert f"checkpoint directory {target}" in result.output
    words = live.words("checkpoint")
    assert words[words.index("--image-path") + 1] == str(target / "checkpoint")
    assert live.status == "running"
    live.set_status("gone")
    done = invoke("restore", f"{target}", "--name", "two", "--detach", "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.output)["container"]["id"] == "two"
    restored = live.words("restore")
    assert "--tcp-established" in restored or "tcp-established" in (
        (Path(paths.container_directory(None, "two")) / "criu.conf").read_text()
    )
    assert list((tmp_path / "scratch").iterdir()) == []


@root_only
def test_to_the_local_store_and_back(live: LiveRuntime, tmp_path: Path) -> None:
    result = invoke("checkpoint", "web", "--json")
    assert result.exit_code == 0, result.exception
    said = json.loads(result.output)
    assert said["container"] == "web" and said["image"]["digest"].startswith("sha256:")
    assert live.status == "gone"
    assert list((tmp_path / "scratch").iterdir()) == []
    done = invoke("restore", "web", "--detach", "--quiet")
    assert done.exit_code == 0, done.exception
    assert done.output == "web\n"
    assert live.status == "running"


@root_only
def test_a_store_that_fails_lets_the_container_run_on(live: LiveRuntime, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the store should be")
    assert invoke("checkpoint", "web").exit_code != 0
    assert live.status == "running"
    assert list((tmp_path / "scratch").iterdir()) == []


@root_only
def test_the_status_of_a_followed_container(live: LiveRuntime, tmp_path: Path) -> None:
    assert invoke("checkpoint", "web", "-o", f"{tmp_path}/out", "--quiet").output == f"{tmp_path}/out\n"
    live.wish(restore={"status": 7, "log": ""})
    script = live.program.read_text()
    live.program.write_text(
        script.replace("if \"status\" in wish:", "if verb == 'restore': open(value('--pid-file'), 'w').write('1')\n"
                       "if \"status\" in wish:")
    )  # fmt: skip
    assert invoke("restore", f"{tmp_path}/out").exit_code == 7


@root_only
@pytest.mark.parametrize("name", ["inventory.img", "cryoci.json"])
def test_a_directory_that_is_no_checkpoint(live: LiveRuntime, tmp_path: Path, name: str) -> None:
    invoke("checkpoint", "web", "-o", f"{tmp_path}/out")
    for path in (tmp_path / "out").rglob(name):
        path.unlink()
        path.symlink_to("/etc/passwd")
    fails("restore", f"{tmp_path}/out")
    assert "restore" not in live.verbs


def test_no_archives(live: LiveRuntime) -> None:
    error = fails("checkpoint", "web", "-o", "x.tar.gz")
    assert isinstance(error, UsageError)
    assert live.verbs == []
