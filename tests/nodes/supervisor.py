# SPDX-License-Identifier: Apache-2.0
"""The process that keeps a node and cleans up after it (init.py), as the harness sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cryoci.errors import UnsupportedError


class Supervisor:
    """A started node's supervisor; `pid` is what it keeps, a pid of the host. Raises UnsupportedError."""

    def __init__(self, spec: dict[str, Any]) -> None:
        cluster = Path(spec["cgroup"]).parent.name  # shows in ps, and leftovers() looks for it there
        self._process = subprocess.Popen(
            [sys.executable, "-IS", str(Path(__file__).with_name("init.py")), cluster, spec["name"]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(spec).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = {"error": (line + self._process.stdout.read()).decode(errors="replace")}
        if "pid" not in answer:
            self.stop()
            raise UnsupportedError(
                f"cannot start test node {spec['name']}: {answer['error']}",
                hint="nodes need root, namespaces, overlayfs and cgroup2; a container needs --privileged",
            )
        self.pid: int = answer["pid"]

    @property
    def alive(self) -> bool:
        """Whether what it keeps runs; it ends itself after that."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Kill what it keeps and wait until it is gone with its cgroup: the end of its stdin tells it to."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
