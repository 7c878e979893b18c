# SPDX-License-Identifier: Apache-2.0
"""cryoci cdi: the devices that containers of this node can get."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cryoci.cli import output


@click.group("cdi", short_help="Devices of this node.")
def command() -> None:
    """Show the devices that containers can get, or describe this node's NVIDIA GPUs as a CDI specification.

    \b
    Examples:
      cryoci cdi list
      cryoci cdi generate --output /etc/cdi/nvidia.json
    """


@command.command("list")
@output.json_option
@output.quiet_option
def list_devices(as_json: bool, quiet: bool) -> None:
    """List the devices by the names that io.cryoci.gpus and cdi.k8s.io/* annotations take."""
    from cryoci.shim import config
    from cryoci.shim.devices import inject

    found = inject.registry(config.load().devices)
    devices = sorted(found.devices.values(), key=lambda d: d.qualified)
    for problem in found.problems:
        click.echo(f"cryoci: {output.printable(problem)}", err=True)
    if as_json:
        output.emit_json(
            [{"name": d.qualified, "source": d.source, "containerEdits": d.edits} for d in devices]
        )
    elif quiet:
        for device in devices:
            click.echo(output.printable(device.qualified))
    elif not devices:
        places = ", ".join(config.load().devices.cdi_directories)
        output.note(f"no devices: no CDI specification in {places}, and no NVIDIA driver that shows a GPU")
        output.note("`cryoci cdi generate` says what is missing")
    else:
        rows = [
            (
                d.qualified,
                " ".join(str(n["path"]) for n in d.edits.get("deviceNodes") or ()),
                d.source,
            )
            for d in devices
        ]
        output.table(("DEVICE", "NODES", "FROM"), rows)


@command.command("generate")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="File. Default: stdout.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="/",
    help="Look at the host whose root directory this is, as from inside of a container.",
)
def generate(target: Path | None, root: Path) -> None:
    """Describe this node's NVIDIA driver and GPUs as a CDI specification, in JSON and without hooks.

    Not needed by cryoci, which does the same whenever no specification is there; other engines read it
    from /etc/cdi. Make it anew after the driver was upgraded.
    """
    from cryoci.files import write_atomic
    from cryoci.shim.devices import nvidia

    text = json.dumps(nvidia.specification(str(root)), indent=2) + "\n"
    if target is None:
        click.echo(text, nl=False)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, text, mode=0o644)
