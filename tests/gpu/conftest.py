# SPDX-License-Identifier: Apache-2.0
"""The suite for a GPU: quick tests first, a time limit for each, and a page of results even when it is cut short.

python3 -m pytest tests/gpu                          all of it, about 20 minutes on one GPU
python3 -m pytest tests/gpu -k "share or guard"      a group: cdi, share, guard, bake, plugin, refusals, cuda
GPU_RESULTS=FILE.md                                  where the page goes; default build/gpu-results.md
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from cryoci.command import run
from cryoci.errors import CryociError
from cryoci.shim.gpu import nvml
from tests.gpu.machine import BASE
from tests.gpu.results import LINES

ORDER = ("cdi", "share", "guard", "bake", "plugin", "refusals", "cuda")  # least often run first
_PAGE = Path(os.environ.get("GPU_RESULTS", "build/gpu-results.md"))
_outcomes: list[tuple[str, str, float]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files of this folder; others keep their places."""
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    rank = {f"test_{name}": n for n, name in enumerate(ORDER)}
    ordered = iter(sorted(mine, key=lambda item: rank.get(item.path.stem, len(rank))))
    items[:] = [next(ordered) if item in mine else item for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the page anew after each test."""
    report = yield
    if item.path.parent == Path(__file__).parent and (report.when == "call" or report.outcome != "passed"):
        _outcomes.append((f"{item.path.stem}::{item.name}", report.outcome, report.duration))
        write_page()
    return report


def write_page() -> None:
    """Outcomes and numbers in markdown."""
    try:
        with nvml.opened() as management:
            where = f"{', '.join(gpu.name for gpu in management.gpus())}, driver {management.driver}"
    except CryociError as e:
        where = e.message
    lines = [
        f"# GPU suite, {time.strftime('%Y-%m-%d')}",
        "",
        f"{where}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, "
        f"{_version('criu', '--version')}, {_version('runc', '--version')}, {_version('crun', '--version')}.",
        "",
        "| test | result | s |",
        "|---|---|---:|",
        *(f"| `{name}` | {outcome} | {seconds:.0f} |" for name, outcome, seconds in _outcomes),
        "",
        *(f"    {line}" for line in LINES),
    ]
    _PAGE.parent.mkdir(parents=True, exist_ok=True)
    _PAGE.write_text("\n".join(lines) + "\n")


def _version(*argv: str) -> str:
    try:
        said = run(list(argv), check=False).stdout.decode().splitlines()
    except CryociError:
        said = []
    return said[0].replace("Version:", "criu").replace("version ", "") if said else f"no {argv[0]}"


@pytest.fixture(scope="session")
def registry() -> Iterator[str]:
    """A registry on loopback."""
    BASE.mkdir(parents=True, exist_ok=True)
    config = BASE / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {BASE / 'registry'}}}}}\n"
        "http: {addr: 127.0.0.1:5123}\nlog: {level: error}\n"
    )
    process = subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(1)
    yield "127.0.0.1:5123"
    process.kill()
    process.wait()
