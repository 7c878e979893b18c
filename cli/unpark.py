# SPDX-License-Identifier: Apache-2.0
"""cryoci unpark: bring a parked container back to its GPUs."""

from __future__ import annotations

import click

from cryoci.cli import output


@click.command("unpark", short_help="Bring a parked container back to its GPUs.")
@click.argument("container")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@output.json_option
@output.quiet_option
def command(container: str, runtime_root: str | None, as_json: bool, quiet: bool) -> None:
    """Unpark CONTAINER: bring its GPU memory back to its GPUs, and let it run on.

    While the GPUs have too little free memory it stays parked, and the message says how much is missing.
    Unparking a running container does nothing.

    \b
    Examples:
      cryoci unpark llama
    """
    from cryoci.cli.signals import unwinding
    from cryoci.shim import engines
    from cryoci.shim.engines import gpu

    with unwinding():
        done = gpu.unpark(engines.find(container, root=runtime_root))
    output.parked(done, as_json=as_json, quiet=quiet)
