# SPDX-License-Identifier: Apache-2.0
"""cryoci-runtime passes through: words, files, signals, environment, output and status unchanged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.unit.fake_runtime import LAUNCHER, FakeNode

PASSED = [
    ["--version"],
    ["--help"],
    [],
    ["features"],
    ["checkpoint", "--help"],
    ["restore", "--lsm-mount-context"],
    ["create"],
    ["create", "--bundle"],
    ["create", "--new-flag", "x", "c1"],
    ["--root", "create", "--log=run", "--systemd-cgroup", "state", "c1"],
    ["start", "c1"],
    ["kill", "--all", "c1", "9"],
    ["exec", "-t", "c1", "sh", "-c", "echo create"],
    ["delete", "--force", "checkpoint"],
    ["bogus", "create", "x"],
    ["--bogus", "create", "c1"],
    ["--", "list"],
    ["state", "näme", "\udcff"],
    ["events", "--interval", "1s", "c1"],
    [""],
]


@pytest.mark.parametrize("words", PASSED, ids=" ".join)
def test_words_status_and_output_are_the_runtimes(fake: FakeNode, words: list[str]) -> None:
    path = fake.add("runc")
    said = bytes(range(256))
    result = fake.call(*words, env={"FAKE_STATUS": "7", "FAKE_STDOUT": said.hex(), "FAKE_STDERR": "oh"})
    assert (result.returncode, result.stdout, result.stderr) == (7, said, b"oh")
    assert fake.words == words
    assert fake.calls[-1]["program"] == str(path)
    assert len(fake.calls) == 1


def test_environment_and_directory(fake: FakeNode, tmp_path: Path) -> None:
    fake.add("runc")
    fake.call("state", "x", env={"A": "1", "EMPTY": ""}, cwd=tmp_path)
    call = fake.calls[-1]
    seen = dict(word.split("=", 1) for word in call["env"])
    # no LC_CTYPE of Python's own; shells set PWD when it is not there, and bash counts itself
    for name, value in (("PWD", str(tmp_path)), ("OLDPWD", None), ("SHLVL", None), ("_", None)):
        assert seen.pop(name, value) == value or value is None
    assert seen == {**fake.env, "A": "1", "EMPTY": "", "CRYOCI_DEPTH": "1"}
    assert call["cwd"] == str(tmp_path)


def test_files_stay_open_under_their_numbers(fake: FakeNode, tmp_path: Path) -> None:
    fake.add("runc")
    fds = [os.open(tmp_path / f"f{n}", os.O_RDWR | os.O_CREAT) for n in range(3)]
    high = os.dup2(fds[0], 41)
    fake.call("exec", "--preserve-fds", "3", "x", "ls", env={"LISTEN_FDS": "1"}, pass_fds=[*fds, high])
    seen = fake.calls[-1]["fds"]
    for n, fd in enumerate(fds):
        assert seen[str(fd)] == str(tmp_path / f"f{n}")
        os.close(fd)
    assert seen["41"] == str(tmp_path / "f0")
    os.close(41)
    # stdio, ours, and the directory and source that the fake itself has open while it looks
    mine = {"0", "1", "2", "41", *map(str, fds)}
    assert not [t for n, t in seen.items() if n not in mine and "cryoci" in t and "/bin/runc" not in t]


def test_ignored_signals_are_not_inherited_from_python(fake: FakeNode) -> None:
    """Python ignores SIGPIPE and SIGXFSZ; what the caller ignores (as CI's own parents may) stays ignored."""
    script = fake.bin / "runc"
    script.write_text("#!/bin/sh\nexec /bin/grep SigIgn /proc/self/status\n")
    script.chmod(0o755)
    plain = subprocess.run([script], stdout=subprocess.PIPE, check=True).stdout
    assert fake.call("state", "x").stdout == plain


def test_killed_runtime_is_a_killed_process(fake: FakeNode) -> None:
    fake.add("runc")
    assert fake.call("state", "x", env={"FAKE_SIGNAL": "9"}).returncode == -signal.SIGKILL


def test_pid_stays_so_that_parent_death_and_wait_work(fake: FakeNode) -> None:
    fake.add("runc")
    process = subprocess.Popen([fake.launcher, "state", "x"], env=fake.env)
    process.wait(20)
    assert fake.calls[-1]["pid"] == process.pid


def test_runc_before_crun_and_crun_when_alone(fake: FakeNode) -> None:
    fake.add("crun")
    fake.call("list")
    assert fake.calls[-1]["program"].endswith("/crun")
    fake.add("runc")
    fake.call("list")
    assert fake.calls[-1]["program"].endswith("/runc")


def test_it_does_not_find_itself(fake: FakeNode, tmp_path: Path) -> None:
    (fake.bin / "runc").symlink_to(LAUNCHER)  # installed over runc's own name
    other = fake.add("runc", at=tmp_path / "other" / "runc")
    result = fake.call("list", env={"PATH": f"{fake.bin}:{other.parent}"})
    assert result.returncode == 0
    assert fake.calls[-1]["program"] == str(other)


def test_a_circle_through_a_wrapper_ends(fake: FakeNode) -> None:
    wrapper = fake.bin / "runc"
    wrapper.write_text(f'#!/bin/sh\nexec {fake.launcher} "$@"\n')
    wrapper.chmod(0o755)
    result = fake.call("state", "x")
    assert result.returncode == 1
    assert b"circle" in result.stderr and b"hint:" in result.stderr


def test_no_runtime_at_all(fake: FakeNode) -> None:
    if any(
        shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
        for name in ("runc", "crun")
    ):
        pytest.skip("this machine has a runtime in the directories that are always searched")
    result = fake.call("state", "x")
    assert result.returncode == 1
    assert b"no OCI runtime found" in result.stderr and b"install runc or crun" in result.stderr


def test_from_a_source_tree_an_installed_tree_and_a_chain_of_links(fake: FakeNode, tmp_path: Path) -> None:
    fake.add("runc")
    source = LAUNCHER.parents[2]
    site = tmp_path / "site" / "cryoci"
    shutil.copytree(source / "cryoci", site, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    chain = tmp_path / "a" / "b"
    chain.parent.mkdir()
    chain.symlink_to("../c")
    (tmp_path / "c").symlink_to(site / "shim" / "launcher.py")
    # a checkout may itself be called cryoci
    clone = tmp_path / "clone" / "cryoci"
    shutil.copytree(source / "shim", clone / "shim", ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "cryoci").mkdir()
    shutil.copy(source / "cryoci" / "__init__.py", clone / "cryoci")
    (clone / "cryoci" / "shim").symlink_to("../shim")
    for path in (source / "shim" / "launcher.py", LAUNCHER, chain, clone / "shim" / "launcher.py"):
        result = subprocess.run([path, "state", "x"], env=fake.env, capture_output=True, timeout=20)
        assert (result.returncode, result.stderr) == (0, b""), path
    assert len(fake.calls) == 4


def test_relative_call(fake: FakeNode) -> None:
    fake.add("runc")
    result = subprocess.run(["./cryoci-runtime", "list"], cwd=fake.bin, env=fake.env, timeout=20)
    assert result.returncode == 0


# Lines of a recorded container: which the shell part takes (True), and which it leaves to Python.
LINES = [
    ("state c1", True),
    ("start c1", True),
    ("pause c1", True),
    ("resume c1", True),
    ("kill --all c1 9", True),
    ("kill c1 KILL", True),
    ("exec --process /p --console-socket /s -d --pid-file=/f c1", True),
    ("exec -t c1 sh -c state", True),
    ("ps --format json c1", True),
    ("update --resources=- c1", True),
    ("update --resources - c1", True),
    ("--debug --root /run/runc --log /l --log-format=json --systemd-cgroup start c1", True),
    ("--root=/run/crun state c1", True),
    ("--root state state c1", False),
    ("--root default state c1", False),
    ("--root= state c1", False),
    ("--root /run/x/../runc state c1", False),
    ("--root", False),
    ("-root /run/runc state c1", False),
    ("-- state c1", False),
    ("state -- c1", False),
    ("state --help c1", False),
    ("exec -e A=B c1 ls", False),
    ("state other", False),
    ("state ../default/c1", False),
    ("state .", False),
    ("state", False),
    ("", False),
    ("delete c1", False),
    ("create c1", False),
    ("run c1", False),
    ("checkpoint c1", False),
    ("restore c1", False),
    ("--version", False),
    ("list", False),
]


@pytest.mark.parametrize(("text", "fast"), LINES)
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_shell_part_takes_what_it_is_sure_of(
    fake: FakeNode, tmp_path: Path, shell: str, text: str, fast: bool
) -> None:
    path = shutil.which(shell) or pytest.skip(f"no {shell} on this machine")
    runc = fake.add("runc", at=tmp_path / "elsewhere" / "runc")
    fake.record("c1").mkdir(parents=True)
    (fake.record("c1") / "runtime").write_text(f"{runc}\n")
    source = LAUNCHER.read_text()
    python = 'exec /usr/bin/python3 -IS "$0" "$@"'
    assert source.count(python) == 1
    copy = tmp_path / "launcher"
    copy.write_text(source.replace(python, "exit 99"))
    options = ["--posix"] if shell == "bash" else []
    result = subprocess.run(
        [path, *options, copy, *text.split()], env=fake.env, capture_output=True, timeout=20
    )
    assert (result.returncode, result.stderr) == (0 if fast else 99, b"")
    if fast:
        assert fake.words == text.split() and fake.calls[-1]["program"] == str(runc)
        # and Python, given the same line, agrees
        subprocess.run(["/usr/bin/python3", "-IS", fake.launcher, *text.split()], env=fake.env, timeout=20)
        assert [c["argv"] for c in fake.calls[-2:]] == [[str(runc), *text.split()]] * 2


def test_the_shell_part_knows_the_same_directories(fake: FakeNode) -> None:
    runc = fake.add("runc")
    script = fake.bin / "other"
    script.write_text("#!/bin/sh\necho other\n")
    script.chmod(0o755)
    for root in ("/run/containerd/runc/k8s.io", "/a", "/a-b_c+d.e/F0"):
        fake.call("--root", root, "create", "--bundle", str(fake.bundle()), "c1")
        assert fake.calls[-1]["program"] == str(runc)
        (record,) = (fake.run_directory / "containers").glob("*/c1")
        (record / "runtime").write_text(f"{script}\n")
        assert fake.call("--root", root, "state", "c1").stdout == b"other\n"
        shutil.rmtree(record.parent)


def test_a_record_that_names_cryoci_or_nothing_is_passed_by(fake: FakeNode) -> None:
    fake.add("runc")
    fake.record("c1").mkdir(parents=True)
    for target in (fake.launcher, LAUNCHER, "/nonexistent", "relative", fake.directory, ""):
        (fake.record("c1") / "runtime").write_text(f"{target}\n")
        assert fake.call("state", "c1").returncode == 0
    assert len(fake.calls) == 6
