# SPDX-License-Identifier: Apache-2.0
"""config.toml: what is refused and how, the cache, and that a broken file does not take a node down."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import ConfigError
from cryoci.shim import config
from cryoci.shim.criu import conf
from cryoci.shim.criu.options import CGROUP_MODES, NETWORK_LOCKS, CriuOptions, parse_size
from tests.unit.fake_runtime import FakeNode

SAMPLE = Path(__file__).resolve().parents[2] / "crio-config" / "config.toml"


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("[criu]\ntcp_established = true", "unknown key 'tcp_established' in [criu]", "'tcp-established'"),
        ("[criu]\nghostlimit = 1", "unknown key 'ghostlimit'", "'ghost-limit'"),
        ("[crui]\n", "unknown key 'crui'", "'criu'"),
        ("[runtime]\nname = 'x'", "unknown key 'name' in [runtime]", "path"),
        ("runtime = 'runc'", "not a table", "[runtime]"),
        ("[runtime]\npath = 3", "[runtime] path is 3", "absolute path"),
        ("[runtime]\npath = 'bin/runc'", "'bin/runc'", "absolute path"),
        ("[runtime]\npath = ''", "[runtime] path", "name such as"),
        ("[criu]\ntimeout = 0", "[criu] timeout is 0", "1 to 86400"),
        ("[criu]\ntimeout = true", "timeout is True", "whole number"),
        ("[criu]\ntcp-close = 'yes'", "not a switch", "true or false"),
        ("[criu]\nghost-limit = '1X'", "not a size", '"1M"'),
        ("[criu]\nghost-limit = '5G'", "less than 4G", '"1G"'),
        ("[criu]\nghost-limit = -1", "not a size", '"1M"'),
        ("[criu]\nnetwork-lock = 'ebtables'", "network-lock is 'ebtables'", "iptables, nftables, skip"),
        ("[criu]\nmanage-cgroups = 'yes'", "manage-cgroups", "ignore"),
        ("[criu]\nexternal = 'mnt[]'", "not a list", "mnt[/data]:data"),
        ('[criu]\nexternal = ["a\\nlog-file /x"]', "cannot carry", "blanks"),
        ('[criu]\nlibdir = "/usr/lib/#criu"', "cannot carry", "#"),
        ("[criu]\nlibdir = 'lib'", "not an absolute path", "/usr/lib/criu"),
        ("[criu]\nlog-level = 5", "log-level is 5", "0 to 4"),
        ("[criu\n", "not valid TOML", "sample"),
        ("a = '\udcff'", "not valid TOML", "sample"),
    ],
)
def test_refused(tmp_path: Path, text: str, reason: str, hint: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as error:
        config.load(str(path))
    assert str(path) in error.value.message
    assert reason in error.value.message
    assert error.value.hint and hint in error.value.hint


def test_absent_is_all_defaults(tmp_path: Path) -> None:
    assert config.load(str(tmp_path / "none")) == config.Config()


def test_unreadable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        config.load(str(tmp_path))


def test_all_keys(tmp_path: Path) -> None:
    text = """
[runtime]
path = "/usr/sbin/runc"
[criu]
tcp-established = true
file-locks = false
ghost-limit = "64M"
timeout = 60
external = ["mnt[/data]:data", "dev[8/0]:disk"]
network-lock = "skip"
"""
    path = tmp_path / "c"
    path.write_text(text)
    got = config.load(str(path))
    assert got.runtime == "/usr/sbin/runc"
    assert got.criu == CriuOptions(
        tcp_established=True,
        file_locks=False,
        ghost_limit=64 << 20,
        timeout=60,
        external=("mnt[/data]:data", "dev[8/0]:disk"),
        network_lock="skip",
    )


def test_the_sample_documents_every_key_and_is_valid() -> None:
    text = SAMPLE.read_text()
    live = "\n".join(
        line[1:] if line[:1] == "#" and line[1:2] not in (" ", "") else line for line in text.splitlines()
    )
    values = tomllib.loads(live)  # every commented-out setting switched on
    config.parse(values)
    assert set(values["criu"]) == {f.name.replace("_", "-") for f in fields(CriuOptions)}
    assert set(values["runtime"]) == {"path"}
    made = config.Config()
    for table, of in (("gpu", made.gpu), ("devices", made.devices), ("memory", made.memory)):
        named = {f.name.replace("_", "-") for f in fields(of)}
        assert set(values[table]) == {"engine" if name == "parallel" else name for name in named}
    assert config.parse(tomllib.loads(text)) == config.Config()  # as shipped it changes nothing


@pytest.mark.parametrize(
    ("text", "size"), [("1K", 1024), ("1M", 1 << 20), ("2g", 2 << 30), ("7", 7), (9, 9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, "x") == size


OPTIONS = st.builds(
    CriuOptions,
    **{
        name: st.none() | st.booleans()
        for name in ("tcp_established", "tcp_close", "file_locks", "link_remap")
    },
    ghost_limit=st.none() | st.integers(0, (1 << 32) - 1),
    timeout=st.none() | st.integers(1, 86400),
    network_lock=st.none() | st.sampled_from(NETWORK_LOCKS),
    manage_cgroups=st.none() | st.sampled_from(CGROUP_MODES),
    external=st.lists(st.sampled_from(["mnt[/a]:a", "dev[1/2]:b"]), unique=True).map(tuple),
    log_level=st.none() | st.integers(0, 4),
)


@given(OPTIONS, OPTIONS)
def test_mapping_and_merge(a: CriuOptions, b: CriuOptions) -> None:
    assert CriuOptions.from_mapping(json.loads(json.dumps(a.to_mapping()))) == a
    merged = a.merge(b)
    assert a.merge(CriuOptions()) == a
    for field in fields(CriuOptions):
        mine, theirs, got = (getattr(o, field.name) for o in (a, b, merged))
        assert (
            set(got) == {*mine, *theirs}
            if field.name == "external"
            else got == (mine if theirs is None else theirs)
        )


def test_criu_file() -> None:
    options = CriuOptions(
        tcp_established=True, file_locks=False, ghost_limit=1 << 20, external=("mnt[/a]:a", "x"), log_level=4
    )
    lines = conf.render(options, "dump").splitlines()
    assert lines[0].startswith("#")
    assert lines[1:] == [
        "tcp-established",
        "no-file-locks",
        "ghost-limit 1048576",
        "external mnt[/a]:a",
        "external x",
        "verbosity 4",
    ]
    assert "ghost-limit" not in conf.render(options, "restore")


def test_the_configured_runtime_is_used_and_cached(fake: FakeNode) -> None:
    fake.add("runc")
    other = fake.add("other", "crun version 1.21")
    fake.config.write_text('[runtime]\npath = "other"\n[criu]\ntimeout = 9\n')
    fake.call("state", "x")
    assert fake.calls[-1]["program"] == str(other)
    cache = fake.run_directory / "config.cache"
    assert "timeout 9" in cache.read_text() and cache.stat().st_mode & 0o777 == 0o600
    fake.config.write_text(f'[runtime]\npath = "{fake.bin}/runc"\n')
    fake.call("state", "x")
    assert fake.calls[-1]["program"].endswith("/runc")


def test_a_removed_configuration_is_forgotten(fake: FakeNode) -> None:
    fake.add("runc")
    fake.add("other")
    fake.config.write_text('[runtime]\npath = "other"\n')
    fake.call("list")
    fake.config.unlink()
    fake.call("list")
    assert [c["program"].rsplit("/", 1)[1] for c in fake.calls] == ["other", "runc"]


def test_a_broken_cache_is_made_anew(fake: FakeNode) -> None:
    other = fake.add("other")
    fake.config.write_text('[runtime]\npath = "other"\n')
    for junk in (b"", b"\xff\xfe", b"cryoci config 1\n1 2\n/x\n\n", b"cryoci config 1\n1 2 3\n", b"x" * 99):
        fake.run_directory.mkdir(exist_ok=True)
        (fake.run_directory / "config.cache").write_bytes(junk)
        assert fake.call("list").returncode == 0
        assert fake.calls[-1]["program"] == str(other)


def test_broken_file_last_good_runtime_serves_on(fake: FakeNode) -> None:
    fake.add("runc")
    other = fake.add("other")
    fake.config.write_text('[runtime]\npath = "other"\n')
    fake.call("list")
    fake.config.write_text("[runtime\n")
    for words in (["state", "x"], ["kill", "x", "9"], ["delete", "x"], ["exec", "x", "ls"], ["--version"]):
        assert fake.call(*words).returncode == 0
        assert fake.calls[-1]["program"] == str(other)


def test_broken_file_without_a_past_means_the_default(fake: FakeNode) -> None:
    runc = fake.add("runc")
    fake.config.write_text("[runtime]\npaht = 'crun'\n")
    assert fake.call("state", "x").returncode == 0
    assert fake.calls[-1]["program"] == str(runc)


@pytest.mark.parametrize("verb", ["create", "run", "restore", "checkpoint"])
def test_broken_file_stops_new_containers_with_the_reason(fake: FakeNode, tmp_path: Path, verb: str) -> None:
    if verb in ("restore", "checkpoint") and os.geteuid() != 0:
        pytest.skip("checkpoint and restore refuse other users before they read the configuration")
    fake.add("runc")
    fake.add("criu")
    fake.config.write_text("[runtime]\npaht = 'crun'\n")
    log = tmp_path / "log.json"
    words = ["--log", str(log), "--log-format", "json", verb, "--bundle", str(fake.bundle()), "c1"]
    if verb == "checkpoint":
        del words[5:7]
    result = fake.call(*words)
    assert result.returncode == 1
    assert fake.calls == []
    assert b"unknown key 'paht'" in result.stderr and b"did you mean 'path'?" in result.stderr
    entry = json.loads(log.read_text().splitlines()[-1])
    assert entry["level"] == "error" and "paht" in entry["msg"] and list(entry) == ["level", "msg", "time"]
    spec = (fake.bundle("bundle").parent / "bundle" / "config.json").read_text()
    assert "org.criu.config" not in spec


@pytest.mark.parametrize("verb", ["create", "state"])
def test_the_configured_runtime_must_not_be_cryoci(fake: FakeNode, verb: str) -> None:
    fake.add("runc")
    fake.config.write_text(f'[runtime]\npath = "{fake.launcher}"\n')
    result = fake.call(verb, "--bundle", str(fake.bundle()), "x")
    if verb == "state":
        assert result.returncode == 0 and fake.calls[-1]["program"].endswith("/runc")
    else:
        assert result.returncode == 1 and b"is cryoci-runtime itself" in result.stderr


def test_a_runtime_that_is_not_there(fake: FakeNode) -> None:
    fake.add("runc")
    fake.config.write_text('[runtime]\npath = "/nonexistent/runc"\n')
    result = fake.call("create", "--bundle", str(fake.bundle()), "x")
    assert result.returncode == 1 and b"/nonexistent/runc is not a program" in result.stderr
    assert fake.call("state", "x").returncode == 0
