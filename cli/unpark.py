# SPDX-License-Identifier: Apache-2.0
"""cryoci unpark: bring a parked container back to its GPUs."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import app_options, output, told


@click.command("unpark", short_help="Bring a parked container back to its GPUs.")
@click.argument("container")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@app_options.without
@output.registry_options
@told.options
@output.json_option
@output.quiet_option
def command(
    container: str, runtime_root: str | None, no_hooks: bool, as_json: bool, quiet: bool, **where: Any
) -> None:
    """Unpark CONTAINER: bring its GPU memory back to its GPUs, and let it run on.

    While the GPUs have too little free memory it stays parked, and the message says how much is missing.
    Unparking a running container does nothing. One that a `cryoci share`, which has ended, has put on disk or into a
    registry is restored from there. If its application prepared itself before it was parked, it does what it does
    after a restore (annotation io.cryoci.post-restore).

    \b
    Examples:
      cryoci unpark llama
    """
    from cryoci.cli.signals import unwinding
    from cryoci.uses import moving, unpark

    with (
        unwinding(),
        told.about(f"cryoci unpark {container}", told.take(where)) as page,
        output.progress(quiet or as_json) as progress,
        moving.shown(progress),
    ):
        done = unpark.unpark(
            container,
            root=runtime_root,
            say=lambda line: output.warn([line]),
            registry=output.options(**where),
            hooks=not no_hooks,
        )
        page.seconds = done.seconds
    output.parked(done, as_json=as_json, quiet=quiet)
