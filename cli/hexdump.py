# SPDX-License-Identifier: Apache-2.0
"""Memory for people: maps, matches, and a hexdump as hexdump(1) -C has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cryoci.cli import output

if TYPE_CHECKING:
    from cryoci.ociimage.memparse import Answer

_WIDTH = 16


def lines(found: Answer) -> Iterator[str]:
    """The answer about one process, a line each."""
    if found.wanted.maps:
        for one in found.maps:
            area = one.area
            share = "s" if area.shared else "p"
            yield f"{area.start:012x}-{area.end:012x} {area.rights}{share} {output.size(one.stored):>8} {area.kind}"
        return
    if found.wanted.pattern() is not None:
        for match in found.matches:
            text = output.printable((match.before + match.found + match.after).decode("latin-1"))
            yield f"{match.address:012x} {match.area:<9} {text}"
        return
    left = found.wanted.limit
    for start, data in found.pieces:
        for line in dump(start, data):
            if left == 0:
                yield f"... (more than --limit {found.wanted.limit} lines)"
                return
            left -= 1
            yield line


def dump(start: int, data: bytes) -> Iterator[str]:
    """Lines of 16 bytes; lines that repeat the one before are one "*"."""
    before, starred = None, False
    for at in range(0, len(data), _WIDTH):
        row = data[at : at + _WIDTH]
        if row == before and len(row) == _WIDTH and at + _WIDTH < len(data):
            if not starred:
                yield "*"
            starred = True
            continue
        before, starred = row, False
        digits = " ".join(f"{byte:02x}" for byte in row)
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"{start + at:012x}  {digits:<{3 * _WIDTH}} |{text}|"
