# SPDX-License-Identifier: Apache-2.0
"""cryoci materialize: a checkpoint directory for tools and runtimes without cryoci."""

from __future__ import annotations

from pathlib import Path

import click

from cryoci.cli import output


@click.command("materialize", short_help="Make a checkpoint directory whole for CRIU alone.")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@output.quiet_option
def command(directory: Path, quiet: bool) -> None:
    """Put the memory that cryoci moved past CRIU into CRIU's own images, in place.

    DIRECTORY is a checkpoint directory, or the folder of CRIU's images in one. Plain criu, runc and crun restore
    the result, and crit and checkpointctl read it. It needs room for the memory a second time meanwhile.

    \b
    Examples:
      cryoci materialize ./db-checkpoint
    """
    from cryoci.ociimage.progress import Silent
    from cryoci.shim.memory import materialize

    with output.progress(quiet) as shown:
        bar = shown or Silent()
        token = bar.start(directory.name, materialize.size(directory))
        moved = materialize.materialize(directory, lambda n: bar.advance(token, n))
    if not quiet:
        click.echo(f"{directory}: {output.size(moved)} of memory are in CRIU's images now")
