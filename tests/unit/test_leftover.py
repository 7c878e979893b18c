# SPDX-License-Identifier: Apache-2.0
"""Runtimes that outlive the daemon that called them."""

from __future__ import annotations

import subprocess
import time

import pytest

from cryoci.uses import leftover


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        (("restore", "--detach", "web"), True),
        (("restore", "--import=/a.tar", "--name=web"), True),
        (("restore", "--detach", "other"), False),
        (("state", "web"), False),
    ],
)
def test_a_restore_that_goes_on_is_waited_for(words: tuple[str, ...], waits: bool) -> None:
    began = time.monotonic()
    with subprocess.Popen(["sh", "-c", "sleep 1; :", *words]) as process:
        leftover.await_end("restore", "web", "web")
        assert (process.poll() is not None or time.monotonic() - began > 0.9) == waits
