# SPDX-License-Identifier: Apache-2.0
"""cryoci repair: bring back what a killed cryoci has left."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("repair", short_help="Bring back a container that a killed cryoci has left half way.")
@click.argument("container")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@output.registry_options
@output.quiet_option
def command(container: str, runtime_root: str | None, quiet: bool, **rest: Any) -> None:
    """Repair CONTAINER after a cryoci, or a tool like it, was killed in the middle of an operation on it.

    Memory that was moved out of its processes is brought back, a frozen container is thawed, and CUDA processes
    that are locked or checkpointed are brought back to their GPUs. What is parked on purpose stays parked. It
    can be run again and again. Memory that `cryoci checkpoint --straight` has stored in a registry is read from there,
    which the options for registries are for.

    \b
    Examples:
      cryoci repair trainer
    """
    from cryoci.cli.signals import unwinding
    from cryoci.shim import engines
    from cryoci.shim.engines import gpu
    from cryoci.shim.record import Record
    from cryoci.uses import moving
    from cryoci.uses.straight import supplier

    with unwinding():
        found = engines.find(container, root=runtime_root)
        with (
            output.progress(quiet) as progress,
            moving.shown(progress, Record(found.root, found.id).directory),
        ):
            done = gpu.repair(found, supplier(output.options(**rest)))
    if not quiet:
        click.echo(f"{container}: {done}")
