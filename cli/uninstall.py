# SPDX-License-Identifier: Apache-2.0
"""cryoci uninstall: put the engines' configuration back as it was."""

from __future__ import annotations

import click


@click.command("uninstall", short_help="Undo cryoci install, to the byte.")
@click.option(
    "--engine", type=click.Choice(["crio", "containerd", "podman", "k3s", "rke2"]), help="Only this one."
)
@click.option("--force", is_flag=True, help="Remove a file of cryoci's even when it was edited since.")
def command(engine: str | None, force: bool) -> None:
    """Put back every file that `cryoci install` changed, and remove those it made.

    Of a file that was edited since, only cryoci's block goes. Containers that run keep running; make sure that none
    of them needs the handler at its next start.

    \b
    Examples:
      cryoci uninstall
      cryoci uninstall --engine containerd
    """
    from cryoci.shim.doctor.check import Facts
    from cryoci.shim.setup.store import Store

    done = Store(Facts()).undo(engine, force=force)
    for one in done:
        click.echo(f"{one.what}: {one.path}")
    click.echo(
        "restart CRI-O, containerd, k3s or RKE2 to make it forget the handler" if done else "nothing to undo"
    )
