# SPDX-License-Identifier: Apache-2.0
"""cryoci memory: look into the memory of checkpointed processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cryoci.cli import output, sealing

if TYPE_CHECKING:
    from cryoci.ociimage.memparse import Row


@click.command("memory", short_help="Look into the memory of a checkpoint.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("-p", "--pid", type=int, metavar="PID", help="Process to look into. Default: a table of all.")
@click.option("--maps", is_flag=True, help="Show what is mapped where, and how much of it is stored.")
@click.option("-s", "--search", metavar="TEXT", help="Find a text.")
@click.option(
    "-r", "--search-regex", "regex", metavar="REGEX", help="Find a regular expression (Python's, bytes)."
)
@click.option("--strings", is_flag=True, help="Print the printable texts, as strings(1) does.")
@click.option(
    "--min-length", type=click.IntRange(1, 4096), default=6, show_default=True, help="Of --strings."
)
@click.option("--range", "span", metavar="START-END", help="Dump addresses, in hexadecimal; or START+BYTES.")
@click.option("-c", "--context", type=click.IntRange(0, 4096), default=0, help="Bytes around each match.")
@click.option(
    "--limit", type=click.IntRange(1), default=10_000, show_default=True, help="Most results to print."
)
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write raw bytes to a file.",
)
@sealing.decrypt_options
@output.registry_options
@output.json_option
def command(references: tuple[str, ...], as_json: bool, **rest: Any) -> None:
    """Look into the memory of the processes of each REF: an image, a directory, or an engine's archive.

    Without --pid: a table of all processes. With it: search, strings, or a dump of addresses; without any of
    these, a hexdump of all that is stored. Only the pages of the process asked for are fetched, where the
    image lets them be told apart. They hold whatever the process held: passwords, keys, data of users.

    \b
    Examples:
      cryoci memory counter:1
      cryoci memory /var/lib/kubelet/checkpoints/*.tar
      cryoci memory counter:1 --pid 1 --search PASSWORD --context 32
      cryoci memory ./export.tar.zst --pid 1 --strings
      cryoci memory counter:1 --pid 1 --range 7ffd04a00000+256
      cryoci memory counter:1 --pid 1 -o pid1.bin
    """
    from cryoci.cli import hexdump
    from cryoci.errors import UsageError
    from cryoci.ociimage import memparse, reference

    options = output.options(**{k: rest.pop(k) for k in ("plain_http", "tls_verify", "ca_file", "authfile")})
    identities = sealing.identities(rest, node=True)
    wanted = memparse.Wanted(**rest)
    if wanted.target and len(references) > 1:
        raise UsageError("--output takes the memory of one checkpoint", hint="name one REF")
    printed = []
    for number, text in enumerate(references):
        ref = reference.parse(text)
        with (
            output.progress(as_json) as progress,
            memparse.opened(
                ref, wanted, progress=progress, registry_options=options, identities=identities
            ) as found,
        ):
            if as_json:
                printed.append(found.to_json())
                continue
            if len(references) > 1:
                click.echo(("\n" if number else "") + found.reference)
            if found.written is not None:
                click.echo(f"wrote {wanted.target}: {output.size(found.written)}")
            elif wanted.pid is None:
                _table(found.processes)
            else:
                for line in hexdump.lines(found):
                    click.echo(line)
    if as_json:
        output.emit_json(printed[0] if len(printed) == 1 else printed)


def _table(rows: Sequence[Row]) -> None:
    output.table(
        ("PID", "PROCESS", "STORED", "MAPPED", "HEAP", "SHARED"),
        [
            (str(row.pid), row.name, *map(output.size, (row.stored, row.mapped, row.heap, row.shared)))
            for row in rows
        ],
    )
