# SPDX-License-Identifier: Apache-2.0
"""cryoci ps: running and parked containers with what they hold on GPUs."""

from __future__ import annotations

import click

from cryoci.cli import output


@click.command("ps", short_help="List running and parked containers with what they hold on GPUs.")
@output.json_option
@output.quiet_option
def command(as_json: bool, quiet: bool) -> None:
    """List the containers of podman and those made through cryoci-runtime: state, GPU and host memory.

    A parked container holds nothing on GPUs; what it held is part of its host memory.

    \b
    Examples:
      cryoci ps
      cryoci ps --json
    """
    from cryoci.shim.engines import need_root
    from cryoci.shim.engines.overview import rows

    need_root()  # podman would tell of its caller's own containers
    found = rows()
    if as_json:
        output.emit_json(found)
    elif quiet:
        for row in found:
            click.echo(row.id)
    else:
        cells = [
            (
                row.name,
                row.state,
                row.engine,
                output.size(row.vram),
                output.size(row.host),
                ", ".join(row.gpus),
            )
            for row in found
        ]
        output.table(("NAME", "STATE", "ENGINE", "GPU MEMORY", "HOST MEMORY", "GPUS"), cells)
