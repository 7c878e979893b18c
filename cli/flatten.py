# SPDX-License-Identifier: Apache-2.0
"""cryoci flatten: a checkpoint directory that names memory of others gets it for its own."""

from __future__ import annotations

from pathlib import Path

import click

from cryoci.cli import output


@click.command("flatten", short_help="Make a thin checkpoint directory independent of its parents.")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@output.quiet_option
def command(directory: Path, quiet: bool) -> None:
    """Bring the memory that DIRECTORY names in other checkpoint directories into it, in place.

    `cryoci checkpoint --incremental --thin` leaves what did not change in the directories of earlier checkpoints,
    beside it; a restore needs all of these. This links their files, or copies them to another file system, each
    compared with its digest, so that they can be removed, and DIRECTORY moved or pushed. It can be repeated.

    \b
    Examples:
      cryoci flatten ./db-monday && rm -r ./db-sunday
    """
    from cryoci.ociimage.progress import Silent
    from cryoci.shim.memory import chain

    with output.progress(quiet) as shown:
        bar = shown or Silent()
        token = bar.start(directory.name, None)
        brought = chain.flatten(chain.images_of(directory), lambda n: bar.advance(token, n))
    if not quiet:
        click.echo(f"{directory}: {output.size(brought)} of memory brought in; it is whole")
