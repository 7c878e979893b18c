# SPDX-License-Identifier: Apache-2.0
"""Where the time of a dump or restore went, by the times that CRIU writes before each line of its log."""

from __future__ import annotations

import re
from typing import Any

_LINE = re.compile(r"\((\d+\.\d+)\)\s*(.*)")


def longest(text: str, most: int = 20) -> list[dict[str, Any]]:
    """The `most` longest pauses of a log in order of time: `at` (seconds), `seconds`, and the line before it."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            now = float(match[1])
            if found:
                found[-1]["seconds"] = round(max(0.0, now - found[-1]["at"]), 6)
            found.append({"at": now, "seconds": 0.0, "line": match[2][:300]})
    chosen = sorted(found, key=lambda one: one["seconds"], reverse=True)[:most]
    return sorted((one for one in chosen if one["seconds"]), key=lambda one: one["at"])
