# SPDX-License-Identifier: Apache-2.0
"""cryoci swap: one container out of the GPU, another one in."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import app_options, output, told


@click.command("swap", short_help="Park one container and unpark another.")
@click.argument("out", metavar="RUNNING")
@click.argument("into", metavar="PARKED")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@app_options.without
@told.options
@output.json_option
@output.quiet_option
def command(
    out: str, into: str, runtime_root: str | None, no_hooks: bool, as_json: bool, quiet: bool, **rest: Any
) -> None:
    """Park RUNNING, then unpark PARKED in its place. If that fails, RUNNING is unparked again.

    \b
    Examples:
      cryoci swap llama mistral
    """
    from cryoci.cli.signals import unwinding
    from cryoci.shim import engines
    from cryoci.shim.record import Record
    from cryoci.uses import moving, swap

    first, second = (engines.find(name, root=runtime_root) for name in (out, into))
    with (
        unwinding(),
        told.about(f"cryoci swap {out} {into}", told.take(rest)) as page,
        output.progress(quiet or as_json) as progress,
        moving.shown(progress, Record(first.root, first.id).directory),
        moving.shown(progress, Record(second.root, second.id).directory),
    ):
        done = swap.swap(first, second, hooks=not no_hooks)
        page.seconds = {f"{one.container}: {name}": t for one in done for name, t in one.seconds.items()}
    if as_json:
        output.emit_json(list(done))
    else:
        for one in done:
            output.parked(one, as_json=False, quiet=quiet)
