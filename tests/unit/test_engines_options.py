# SPDX-License-Identifier: Apache-2.0
"""CRIU's options as flags of cryoci-runtime."""

from __future__ import annotations

from typing import Literal

import pytest

from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.engines.options import criu_flags


@pytest.mark.parametrize(
    ("options", "verb", "words"),
    [
        (CriuOptions(), "dump", []),
        (CriuOptions(tcp_established=True), "dump", ["--tcp-established"]),
        (CriuOptions(ghost_limit=5, timeout=9), "dump", ["--ghost-limit", "5", "--timeout", "9"]),
        (
            CriuOptions(ghost_limit=5, timeout=9, link_remap=True, skip_in_flight=True, shell_job=True),
            "restore",
            ["--shell-job"],
        ),
        (CriuOptions(manage_cgroups="soft"), "restore", ["--manage-cgroups-mode", "soft"]),
        (CriuOptions(external=("a", "b")), "dump", ["--external", "a", "--external", "b"]),
        (CriuOptions(tcp_close=False), "restore", ["--tcp-close=false"]),
    ],
)
def test_flags(options: CriuOptions, verb: Literal["dump", "restore"], words: list[str]) -> None:
    assert criu_flags(options, verb) == words
