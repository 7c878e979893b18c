# SPDX-License-Identifier: Apache-2.0
"""cryoci diff: what changed between two checkpoints."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output, sealing


@click.command("diff", short_help="Show what changed between two checkpoints.")
@click.argument("before")
@click.argument("after")
@click.option("--cmd", is_flag=True, help="Compare command lines and environments too. Fetches memory.")
@click.option("--fetch", is_flag=True, help="Fetch layers that do not say what they hold, however large.")
@click.option("--show-unchanged", is_flag=True, help="List what is the same, too.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["container", "sizes", "process", "memory", "file", "socket", "mount", "words"]),
    help="Compare only this; repeatable.",
)
@sealing.decrypt_options
@output.registry_options
@output.json_option
def command(
    before: str,
    after: str,
    as_json: bool,
    cmd: bool,
    fetch: bool,
    show_unchanged: bool,
    only: tuple[str, ...],
    **where: Any,
) -> None:
    """Compare BEFORE and AFTER (images, directories, archives): processes, memory, files, sockets, mounts.

    \b
    Examples:
      cryoci diff counter:1 counter:2
      cryoci diff --only file --only socket counter:1 counter:2
      cryoci diff --json ./monday.tar registry.example.com/team/counter:tuesday
    """
    from cryoci.ociimage import difference, reference, report

    identities, options = sealing.identities(where), output.options(**where)
    with output.progress(as_json) as progress:
        first, second = (
            report.inspect(
                reference.parse(text),
                memory=cmd,
                everything=fetch,
                progress=progress,
                registry_options=options,
                identities=identities,
            )
            for text in (before, after)
        )
    found = difference.compare(first, second, unchanged=show_unchanged, only=only or difference.SECTIONS)
    if as_json:
        output.emit_json(found)
        return
    for one in (first, second):
        if not one.complete:
            add = (
                "--decrypt-key"
                if any(x.media_type.endswith("+encrypted") for x in one.layers)
                else "--fetch"
            )
            click.echo(f"{one.reference} has layers that were not fetched: add {add}", err=True)
    if not found.same_container:
        names = (f"{one.container['name']} {one.container['id'][:12]}".strip() for one in (first, second))
        click.echo(output.printable(f"of different containers: {', '.join(names)}"), err=True)
    click.echo(f"memory {found.memory:+d} bytes, in all {found.total:+d} bytes")
    signs = {"added": "+", "removed": "-", "changed": "~", "same": " "}
    for change in found.changes:
        arrow = (
            f"{change.before} -> {change.after}"
            if change.kind == "changed"
            else change.after or change.before
        )
        click.echo(output.printable(f"{signs[change.kind]} {change.section} {change.subject}: {arrow}"))
    totals = [
        f"{section} {', '.join(f'{counts[kind]} {kind}' for kind in signs if kind in counts)}"
        for section, counts in found.counts.items()
        if counts.keys() - {"same"}
    ]
    click.echo("; ".join(totals) or "nothing changed")
