# SPDX-License-Identifier: Apache-2.0
"""How much of each mapped area is stored: two lists in order of address, gone through once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from cryoci.errors import ImageError
from cryoci.ociimage.criu.memory import Area

Span = tuple[int, int, int]  # first address, the one behind the last, bytes of it that are stored


def stored(areas: Sequence[Area], spans: Iterable[Span]) -> list[int]:
    """Bytes of each area (in order of address) that lie in `spans`; of one that it shares, its part.

    Raises ImageError when areas, or spans, overlap, which those of a process cannot.
    """
    known = sorted(span for span in spans if span[0] < span[1])
    _check([(area.start, area.end) for area in areas], "mapped areas")
    _check([(start, end) for start, end, _ in known], "stored pages")
    result = []
    at = 0
    for area in areas:
        while at < len(known) and known[at][1] <= area.start:
            at += 1
        total, here = 0, at
        while here < len(known) and known[here][0] < area.end:
            start, end, amount = known[here]
            total += amount * (min(end, area.end) - max(start, area.start)) // (end - start)
            here += 1
        result.append(total)
    return result


def _check(pairs: Sequence[tuple[int, int]], what: str) -> None:
    for (_, end), (start, _) in itertools.pairwise(pairs):
        if start < end:
            raise ImageError(f"the checkpoint is damaged: {what} of a process overlap at {start:#x}")
