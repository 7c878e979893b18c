# SPDX-License-Identifier: Apache-2.0
"""What a pass-through call may import: nearly nothing, for it happens at each step of a container."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.unit.fake_runtime import FakeNode

OURS = {
    "cryoci",
    "cryoci.shim",
    "cryoci.shim.dispatch",
    "cryoci.shim.underlying",
    "cryoci.shim.paths",
    "cryoci.shim.argv",
}


def imported(*command: str | Path, env: dict[str, str] | None = None) -> set[str]:
    """Modules that Debian's Python imports for `command`, up to where it becomes another program."""
    result = subprocess.run(
        ["/usr/bin/python3", "-IS", "-X", "importtime", *command], env=env, capture_output=True, timeout=30
    )
    lines = [line for line in result.stderr.decode().splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines} - {"imported package"}


def added(fake: FakeNode, *words: str) -> set[str]:
    """Modules that one call of the launcher imports on top of a bare interpreter's."""
    return imported(fake.launcher, *words, env=fake.env) - imported("-c", "pass")


@pytest.fixture
def true(fake: FakeNode) -> FakeNode:
    """A node whose runtime prints nothing, so that stderr is the launcher's alone."""
    path = fake.bin / "runc"
    path.write_text("#!/bin/true\n")
    path.chmod(0o755)
    return fake


@pytest.mark.parametrize(
    "words",
    [
        ["state", "c1"],
        ["--root", "/r", "--log", "/l", "--log-format", "json", "start", "c1"],
        ["kill", "c1", "9"],
        ["exec", "-p", "/p", "c1"],
        ["--version"],
        ["features"],
        ["checkpoint", "--help"],
        ["restore", "--lsm-mount-context"],
        ["delete", "--force", "unknown"],
    ],
    ids=" ".join,
)
def test_pass_through_imports_nothing_heavy(true: FakeNode, words: list[str]) -> None:
    assert added(true, *words) <= OURS


def test_a_record_and_a_cached_configuration_cost_no_import(true: FakeNode) -> None:
    true.config.write_text('[runtime]\npath = "runc"\n')
    first = added(true, "state", "c1")
    assert "tomllib" in first  # the cache is made by the call that finds none
    assert added(true, "state", "c1") <= OURS
    record = true.record("c1")
    record.mkdir(parents=True)
    (record / "runtime").write_text(f"{true.bin}/runc\n")
    true.config.write_text("broken [")
    assert added(true, "state", "c1") <= OURS


def test_create_parses_no_toml(true: FakeNode) -> None:
    true.config.write_text('[runtime]\npath = "runc"\n')
    added(true, "state", "c1")
    names = added(true, "create", "--bundle", str(true.bundle()), "c1")
    assert "cryoci.shim.bundle" in names
    assert not names & {"tomllib", "dataclasses", "ctypes", "cryoci.shim.config", "difflib"}
