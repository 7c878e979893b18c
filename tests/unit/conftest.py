# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.fake_runtime import FakeNode


@pytest.fixture
def fake(tmp_path: Path) -> FakeNode:
    """A directory that looks like a node to cryoci-runtime, without any runtime yet."""
    return FakeNode(tmp_path)
