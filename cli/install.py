# SPDX-License-Identifier: Apache-2.0
"""cryoci install: tell the engines of this node about cryoci-runtime."""

from __future__ import annotations

import click

from cryoci.cli import output


@click.command("install", short_help="Tell this node's engines about cryoci-runtime.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "crio", "containerd", "podman"]),
    default="auto",
    show_default=True,
    help="Which engine; auto takes every one that is here. k3s and RKE2 are containerd.",
)
@click.option("--runtime", type=click.Choice(["runc", "crun"]), help="The runtime below cryoci-runtime.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
def command(engine: str, runtime: str | None, dry_run: bool) -> None:
    """Add a handler for cryoci-runtime to the configuration of CRI-O, containerd (k3s, RKE2 too) and podman.

    Shows each change as a diff, keeps the originals, asks the engine's own parser, and takes everything back when it
    does not agree. A second time it changes nothing. No engine is restarted: it says what is needed.

    \b
    Examples:
      cryoci install --dry-run
      cryoci install --engine crio --runtime crun
    """
    from cryoci.shim.doctor.check import Facts
    from cryoci.shim.setup import engines
    from cryoci.shim.setup.store import Store

    facts = Facts()
    store = Store(facts)
    for plan in engines.plans(facts, store, engine, runtime):
        pending = store.pending(plan)
        name = f"{plan.engine} {plan.version}".strip()
        for note in plan.notes:
            click.echo(f"{name}: {note}")
        for change in pending:
            click.echo(output.printable_lines(change.diff()), nl=False)
        if not pending:
            click.echo(f"{name}: nothing to change")
            continue
        if not dry_run:
            store.apply(plan)
        click.echo(
            f"{name}: {'would change' if dry_run else 'changed'} {', '.join(c.path for c in pending)}"
        )
        click.echo(f"  needs: {plan.reload}")
