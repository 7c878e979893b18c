# SPDX-License-Identifier: Apache-2.0
"""Numbers and foreign text for people, on a terminal or a page."""

from __future__ import annotations


def size(n: int | None) -> str:
    """`n` bytes for people: 1.5 GB; powers of 1000, as disks and networks count."""
    if n is None:
        return "?"
    value = float(n)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def seconds(t: float) -> str:
    """`t` seconds for people."""
    return f"{t:.2f} s" if t < 10 else f"{t:.0f} s" if t < 120 else f"{t / 60:.1f} min"


def rate(n: int, t: float) -> str:
    """Bytes per second for people."""
    return f"{size(int(n / t))}/s" if t > 0 else ""


def printable(text: str) -> str:
    """`text` without control characters, nor those that turn the direction of what follows."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
