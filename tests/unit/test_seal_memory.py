# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Sealing is one pass: bounded memory both ways, and no scratch copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cryoci.ociimage.seal import age
from tests.unit.images import make_checkpoint, no_credentials, registry, tree_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
SIZE = 192 << 20  # bytes of memory image
LIMIT = 100 << 20  # bytes of resident memory

# Runs a verb in a fork of a small process, so that the memory of this one does not count.
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "cryoci.cli.main", *sys.argv[1:]])
print(json.dumps({"status": done.returncode, "rss": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10}))
"""


def measured(*words: str) -> int:
    """Peak resident bytes of a verb."""
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True, timeout=120
    )
    result = json.loads(said.stdout.splitlines()[-1])
    assert result["status"] == 0, said.stderr
    return int(result["rss"])


def test_memory_stays_bounded_and_nothing_is_copied(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(tmp_path / "ck", 1 << 20)
    block = os.urandom(3 << 20)
    with open(directory / "checkpoint/pages-1.img", "wb") as file:
        for _ in range(SIZE // len(block)):
            file.write(block)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    recipient = age.generate(tmp_path / "id")
    place = f"{registry}/memory/a:1"
    pushed = measured("push", "-q", "--encrypt-to", recipient, str(directory), place)
    pulled = measured("pull", "-q", "--decrypt-key", str(tmp_path / "id"), place, str(tmp_path / "out"))
    assert pushed < LIMIT and pulled < LIMIT, (pushed, pulled)
    assert not list(scratch.iterdir())
    assert tree_of(tmp_path / "out") == tree_of(directory)
