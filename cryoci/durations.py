# SPDX-License-Identifier: Apache-2.0
"""Lengths of time as people write them."""

from __future__ import annotations

import math
import re

from cryoci.errors import UsageError

_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_GRAMMAR = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|)\s*")


def parse(text: str) -> float:
    """Seconds in `text`: a number with ms, s, m, h or d behind it, or bare for seconds. Raises UsageError."""
    matched = _GRAMMAR.fullmatch(text[:64])
    value = float(matched[1]) * _UNITS[matched[2]] if matched else math.nan
    if not 0 < value < 10 * 365 * _UNITS["d"]:
        raise UsageError(
            f"{text[:64]!r} is no length of time", hint="write for example 500ms, 30s, 10m or 1h"
        )
    return value
