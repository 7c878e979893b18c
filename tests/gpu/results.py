# SPDX-License-Identifier: Apache-2.0
"""Numbers that the tests measure, told at once and kept for the page of results; and the GPUs of this machine."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence

from cryoci.errors import CryociError
from cryoci.shim.gpu import nvml

LINES: list[str] = []


def report(name: str, value: object) -> None:
    """A line of numbers for docs/results."""
    LINES.append(f"{name}: {value if isinstance(value, str) else json.dumps(value, default=str)}")
    print(f"RESULT {LINES[-1]}", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> str:
    """Seconds of several runs: the middle, and from which to which."""
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f}, {len(values)} times)"


def gpus() -> tuple[list[nvml.Gpu], str]:
    """The GPUs of this machine; why there are none."""
    try:
        with nvml.opened() as management:
            return management.gpus(), ""
    except CryociError as e:
        return [], e.message
