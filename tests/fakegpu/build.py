# SPDX-License-Identifier: Apache-2.0
"""Compile the fake driver once, and start programs on it."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryoci.command import run, which
from tests.nodes import tree

SOURCE = Path(__file__).with_name("driver.c")
WORKLOAD = Path(__file__).with_name("workload.py")
NAMES = ("libcuda.so.1", "libnvidia-ml.so.1")
CHIP = "Fake H200"
# Each test worker has GPUs of its own: the fake sees all processes below it, those of the others' nodes too.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
UUIDS = tuple(f"GPU-{n:08x}-{_WORKER:04x}-4000-8000-{n:012x}" for n in range(1, 5))
MEMORY = 64 << 20


def library() -> Path:
    """A directory with the driver's two libraries."""
    name = f"fakegpu-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"

    def build(path: Path) -> None:
        path.mkdir(parents=True)
        compiler = which("gcc", package="gcc libc6-dev")
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
        run([compiler, *flags, "-o", path / NAMES[0], SOURCE])
        os.link(path / NAMES[0], path / NAMES[1])

    return tree.cached(name, build)


def devices(uuids: Sequence[str] = UUIDS[:1], *, chip: str = CHIP, memory: int = MEMORY) -> str:
    """Text of the file that lists a node's GPUs."""
    return "".join(f"{uuid} {memory} {chip}\n" for uuid in uuids)


def valid_dump(raw: bytes | str) -> dict[str, Any]:
    """gpu.dump as it was written, which must be what docs/gpu.dump.schema.json says, with nothing left out of it."""
    validator: Any = importlib.import_module("jsonschema")  # comes with oras, without types
    schema = json.loads((tree.REPO / "docs/gpu.dump.schema.json").read_text())
    value: dict[str, Any] = json.loads(raw)
    validator.validate(value, schema)
    for written, known in (
        (value, schema),
        (value["flags"], schema["properties"]["flags"]),
        (value["gpus"][0], schema["properties"]["gpus"]["items"]),
        (value["tasks"][0], schema["properties"]["tasks"]["items"]),
    ):
        assert written.keys() == known["properties"].keys()
    return value


class Program:
    """The workload as a plain process of this machine, on the GPUs that `home` lists."""

    def __init__(self, home: Path, *words: str) -> None:
        self.home = home
        self.status_file = home / f"status.{time.monotonic_ns()}"
        environment = {**os.environ, "FAKEGPU_HOME": str(home)}
        argv = [sys.executable, str(WORKLOAD), str(self.status_file), "--library", str(library() / NAMES[0])]
        self.process = subprocess.Popen([*argv, *words], env=environment, start_new_session=True)
        self.wait(1)

    @property
    def pid(self) -> int:
        return self.process.pid

    def status(self, child: int | None = None) -> dict[str, Any]:
        """What it said last; count 0 before it said anything."""
        path = self.status_file if child is None else Path(f"{self.status_file}.{child}")
        try:
            value: dict[str, Any] = json.loads(path.read_text())
            return value
        except FileNotFoundError:
            return {"count": 0}

    def wait(self, count: int, *, child: int | None = None, seconds: float = 90) -> dict[str, Any]:
        """Wait until it has reached `count`, its GPU memory intact."""
        end = time.monotonic() + seconds
        while (seen := self.status(child))["count"] < count:
            assert self.process.poll() is None, "the program has died"
            assert time.monotonic() < end, f"the program stands still at {seen}"
            time.sleep(0.005)
        assert seen["good"], "its GPU memory has changed"
        return seen

    def runs_on(self) -> None:
        """Assert that it computes, with the GPU memory that it had."""
        self.wait(self.status()["count"] + 2)

    def close(self) -> None:
        """End it and its children."""
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            pass
        self.process.wait()
