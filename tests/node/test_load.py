# SPDX-License-Identifier: Apache-2.0
"""Many containers at once through cryoci-runtime, and nothing left of them."""

from __future__ import annotations

import pytest

from bench import lifecycle

pytestmark = pytest.mark.node


def test_two_hundred_lives(capsys: pytest.CaptureFixture[str]) -> None:
    """100 of runc and 100 of crun, 20 at once: no process, descriptor, mount, cgroup or file stays.

    10 of each are checkpointed and restored in between.
    """
    words = ["--lives", "100", "--at-once", "20", "--checkpoint-every", "10", "runc", "crun"]
    status = lifecycle.in_node(words)
    said = capsys.readouterr().out
    assert status == 0 and "left behind: nothing" in said, said
    assert said.count("| cryoci-runtime | 100 |") == 2
    assert said.count("checkpointed and restored | 10 |") == 4
