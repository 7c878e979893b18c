# SPDX-License-Identifier: Apache-2.0
"""What a push and a pull hold in memory, where there are many CPUs and several large layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .images import make_checkpoint

MOST = 90  # MB of a process; what is there before the first byte moves is 25 of them, and HTTP would add 10
LAYERS, SIZE = 6, 40  # MB each

# a process of its own, whose peak is nobody else's
MOVE = """
import os, re, sys
os.sched_getaffinity = lambda pid: set(range(16))
from pathlib import Path
from cryoci.ociimage import image, parallel, reference
assert (parallel.WIDTH, parallel.WORKERS) == (4, 7)
layout = reference.parse(f"oci:{sys.argv[2]}:1")
if sys.argv[1] == "push":
    image.push(Path(sys.argv[3]), layout)
else:
    image.pull(layout, Path(sys.argv[3]))
# not of getrusage, which counts the process that started this one
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several processes, whose memory does not compress: frames are as large as they get."""
    found = make_checkpoint(tmp_path_factory.mktemp("large") / "checkpoint")
    for number in range(1, LAYERS + 1):
        block = os.urandom(1 << 20)  # further apart than zstd looks back
        (found / f"checkpoint/pages-{number}.img").write_bytes(block * SIZE)
    return found


def peak(*words: object) -> int:
    """Megabytes."""
    said = subprocess.run(
        [sys.executable, "-c", MOVE, *map(str, words)], capture_output=True, text=True, check=True
    )
    return int(said.stdout)


def test_push_and_pull_stay_small_on_many_cpus(large: Path, tmp_path: Path) -> None:
    assert peak("push", tmp_path / "layout", large) < MOST
    assert peak("pull", tmp_path / "layout", tmp_path / "again") < MOST
    for file in large.glob("checkpoint/pages-*.img"):
        assert (tmp_path / "again/checkpoint" / file.name).read_bytes() == file.read_bytes()
