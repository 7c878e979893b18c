# SPDX-License-Identifier: Apache-2.0
"""The processes of a checkpoint and the maps of their memory, as parts of a report's page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from cryoci.amounts import size
from cryoci.ociimage.criu.processes import Process, children
from cryoci.ociimage.report import Report
from cryoci.page import Html, bar_cell, cell, fold, join, keys, paragraph, table, text
from cryoci.uses.memory_map import Map, Region

_PROCESSES, _MAPS, _AREAS, _CELLS = 500, 64, 40, 240  # of each the most that are shown
_WIDTH, _HEIGHT = 1000, 56  # of the drawing of a map
_STORED, _APART = 1, 2  # colors, as page.py has them
_REST = {"zero": 3, "shared": 4, "file": 5, "kernel": 6}
_KEYS = (
    (_STORED, "in CRIU\u2019s pages"),
    (_APART, "out of band"),
    (_REST["zero"], "zero or never touched"),
    (_REST["shared"], "shared memory, stored once"),
    (_REST["file"], "in its file"),
    (_REST["kernel"], "the kernel\u2019s"),
)


def processes(report: Report) -> Html:
    """The process tree as a table."""
    if not report.processes:
        return Html("")
    most = max(process.memory.stored for process in report.processes)
    rows = (
        (
            cell(process.pid, "n"),
            cell(_branch(depth) + process.name),
            cell(process.state, "s"),
            cell(process.uid, "n"),
            cell(len(process.threads), "n"),
            cell(len(process.files), "n"),
            cell(size(process.memory.stored), "n"),
            cell(size(process.memory.virtual), "n"),
            bar_cell([(_STORED, process.memory.stored)], most),
            cell(process.program, "mono"),
        )
        for process, depth in _tree(report.processes)
    )
    columns = ("pid", "process", "state", "uid", "threads", "files", "stored", "mapped", "", "program")
    left = len(report.processes) - _PROCESSES
    caption = "Children are indented" + (f"; {left} more are not shown" if left > 0 else "")
    return table(caption, columns, rows, ("pid", "uid", "threads", "files", "stored", "mapped"))


def _tree(found: Sequence[Process]) -> Iterator[tuple[Process, int]]:
    """Processes with their depths, parents first; at most _PROCESSES."""
    below = children(found)
    todo = [(process, 0) for process in reversed(below.get(0, ()))]
    seen: set[int] = set()
    while todo and len(seen) < _PROCESSES:
        process, depth = todo.pop()
        if process.pid not in seen:
            seen.add(process.pid)
            yield process, depth
            todo += [(child, depth + 1) for child in reversed(below.get(process.pid, ()))]


def _branch(depth: int) -> str:
    return "\u00b7 " * min(depth - 1, 12) + "\u2514 " if depth else ""


def memory(maps: Sequence[Map]) -> Html:
    """The maps, those that store most first; the first is unfolded."""
    found = sorted((one for one in maps if one.regions), key=lambda one: -(one.stored + one.apart))
    if not found:
        return Html("")
    left = len(found) - _MAPS
    more = f" {left} more processes, which store less, are not shown." if left > 0 else ""
    words = paragraph(
        "Areas stand in order of address; a wider one is larger (by the square root), and the height of a color is "
        f"the part of the area that lies there.{more}",
        soft=True,
    )
    return Html(
        words + keys(_KEYS) + join(_process(one, number == 0) for number, one in enumerate(found[:_MAPS]))
    )


def _process(one: Map, first: bool) -> Html:
    said = f"{one.pid} {one.name}: {size(one.stored)} in CRIU\u2019s pages"
    if one.apart:
        said += f", {size(one.apart)} out of band"
    said += f", {size(one.size)} mapped in {len(one.regions)} areas"
    return fold(text(said), Html(_strip(one) + _kinds(one) + _areas(one)), open=first)


def _strip(one: Map) -> Html:
    """The map as a drawing."""
    order = sorted(range(len(one.regions)), key=lambda i: -one.regions[i].size)[:_CELLS]
    shown = [one.regions[i] for i in sorted(order)]
    widths = [math.sqrt(region.size) for region in shown]
    room = _WIDTH - 2 * len(shown)
    scale = room / max(sum(widths), 1.0)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="areas by address">']
    x = 0.0
    for region, width in zip(shown, widths, strict=True):
        wide = width * scale + 1
        parts.append(f"<g><title>{text(_label(region))}</title>")
        y = float(_HEIGHT)
        for color, amount in _parts(region):
            high = _HEIGHT * amount / max(region.size, 1)
            y -= high
            parts.append(
                f'<rect style="fill:var(--c{color})" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}"/>'
            )
        parts.append("</g>\n")
        x += wide + 1
    return Html("".join([*parts, "</svg>"]))


def _label(region: Region) -> str:
    return f"{region.start:x}-{region.end:x} {region.rights} {region.kind}, {size(region.size)}"


def _parts(region: Region) -> list[tuple[int, int]]:
    parts = [(_STORED, region.stored), (_APART, region.apart), (_REST[region.rest_is], region.rest)]
    return [(color, amount) for color, amount in parts if amount > 0]


def _kinds(one: Map) -> Html:
    rows = []
    for kind, regions in one.kinds():
        parts: dict[int, int] = {}
        for region in regions:
            for color, amount in _parts(region):
                parts[color] = parts.get(color, 0) + amount
        whole = sum(region.size for region in regions)
        rows.append(
            (
                cell(kind),
                cell(len(regions), "n"),
                *(cell(size(n), "n") for n in (whole, parts.get(_STORED, 0), parts.get(_APART, 0))),
                cell(size(sum(region.rest for region in regions)), "n"),
                bar_cell(sorted(parts.items()), whole),
            )
        )
    columns = ("kind", "areas", "mapped", "CRIU", "out of band", "not stored", "")
    return table(f"Memory of process {one.pid} by kind", columns, rows, columns[1:-1])


def _areas(one: Map) -> Html:
    largest = sorted(one.regions, key=lambda region: (-(region.stored + region.apart), -region.size))[
        :_AREAS
    ]
    rows = (
        (
            cell(f"{region.start:x}-{region.end:x}", "mono"),
            cell(region.rights, "mono"),
            cell(region.kind),
            *(cell(size(n), "n") for n in (region.size, region.stored, region.apart)),
            bar_cell(_parts(region), region.size),
        )
        for region in largest
    )
    columns = ("addresses", "rights", "kind", "mapped", "CRIU", "out of band", "")
    caption = f"The {len(largest)} areas that store most"
    return fold(text(caption), table(caption, columns, rows, columns[3:-1]))
