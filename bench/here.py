# SPDX-License-Identifier: Apache-2.0
"""This machine in a test node's place, for benchmarks on machines where no node can be started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

from tests.nodes.node import Node, Result


class Here(Node):
    """Commands run as they would in a shell here; there is no network to cut, and nothing to kill."""

    name, address = "here", "127.0.0.1"

    def _execute(
        self, argv: list[str], input: bytes | None, timeout: float | None, env: Mapping[str, str]
    ) -> Result:
        return subprocess.run(
            argv, input=input or b"", capture_output=True, timeout=timeout, env={**env, **os.environ}
        )

    def _by_hand(self) -> str:
        return ""

    @property
    def alive(self) -> bool:
        return True

    def cut(self) -> None:
        raise NotImplementedError

    def join(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        raise NotImplementedError
