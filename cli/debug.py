# SPDX-License-Identifier: Apache-2.0
"""cryoci debug: what is known of a failed attempt, as one file to send."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("debug", short_help="Pack what is known of a failed attempt into one file.")
@click.argument("container")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file. Default: cryoci-debug-ID.tar.gz",
)
def command(container: str, output: Path | None) -> None:
    """Pack the record of CONTAINER (its name, or by id also when it is gone): its last failed dump or
    restore with command line and times, CRIU's logs and their causes, its specification before and after, its
    processes, GPUs, and what `cryoci doctor` finds. Secrets are removed: values of the environment, passwords and
    tokens in command lines. Look at it all the same before you send it: names of files are in it.

    \b
    Examples:
      cryoci debug 7c1f
      cryoci debug web --output /tmp/web.tar.gz
    """
    from cryoci.shim import debug

    target = output or Path(f"cryoci-debug-{container}.tar.gz")
    names = debug.collect(container, target)
    click.echo(f"{target}: {len(names)} files")
