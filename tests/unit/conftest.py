# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the unit tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.unit.fake_runtime import FakeNode

# An example takes as long as the host is busy; pytest-timeout finds what hangs.
hypothesis.settings.register_profile("cryoci", deadline=None)
hypothesis.settings.load_profile("cryoci")


@pytest.fixture
def fake(tmp_path: Path) -> FakeNode:
    """A directory that looks like a node to cryoci-runtime, without any runtime yet."""
    return FakeNode(tmp_path)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that is done ignores signals until its process ends, and here its process goes on."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
