# SPDX-License-Identifier: Apache-2.0
"""cryoci top: a live table of containers, memory and checkpoints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import click

from cryoci.cli import output

_COLUMNS = (
    "NAME",
    "STATE",
    "ENGINE",
    "GPU MEMORY",
    "HOST MEMORY",
    "GPUS",
    "TIER",
    "UNUSED",
    "GUARD",
    "CHECKPOINT",
    "NEXT",
    "CRASHES",
    "NOTE",
)


_ALWAYS = 5  # columns


@click.command("top", short_help="Watch containers, what they hold, and their checkpoints.")
@click.option("--every", default="2s", show_default=True, metavar="TIME", help="Time between two looks.")
@click.option(
    "--once",
    is_flag=True,
    help="Print one table and end; so does a stdout that is no terminal.",
)
@output.json_option
def command(every: str, once: bool, as_json: bool) -> None:
    """Show the containers that run or are parked: memory on GPUs and host, newest and next checkpoint of guards.

    Of members of `cryoci share` it says where they are (running, host, disk, registry), of theirs and those of
    `cryoci idle` how long nobody has used them, and which of the two has parked them.

    \b
    Examples:
      cryoci top
      cryoci top --once --json
    """
    from cryoci import durations
    from cryoci.uses import top

    period = durations.parse(every)
    if as_json:
        output.emit_json(top.lines())
    elif once or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        output.table(*_table(top.lines()))
    else:
        with output.live() as show:
            while True:
                show(*_table(top.lines()))
                time.sleep(period)


def _table(lines: Sequence[object]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; the columns of daemons of which there is nothing to say are left out."""
    rows = [_cells(line) for line in lines]
    shown = [n for n in range(len(_COLUMNS)) if n < _ALWAYS or any(row[n] for row in rows)]
    return [_COLUMNS[n] for n in shown], [[row[n] for n in shown] for row in rows]


def _cells(line: object) -> tuple[str, ...]:
    from cryoci.uses.top import Line

    assert isinstance(line, Line)
    return (
        line.name,
        f"{line.state} by {line.parked_by}" if line.parked_by else line.state,
        line.engine,
        output.size(line.vram),
        output.size(line.host),
        ", ".join(line.gpus),
        line.tier,
        output.seconds(line.unused) if line.unused is not None else "",
        line.guard,
        f"{output.seconds(line.since)} ago" if line.since is not None else "",
        f"in {output.seconds(line.until)}" if line.until is not None else "",
        str(line.crashes) if line.guard else "",
        line.note,
    )
