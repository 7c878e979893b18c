# SPDX-License-Identifier: Apache-2.0
"""cryoci status: which engines of this node know cryoci-runtime."""

from __future__ import annotations

import click

from cryoci.cli import output


@click.command("status", short_help="Show which engines know cryoci-runtime.")
@output.json_option
def command(as_json: bool) -> None:
    """Show the engines of this node, their versions, and what cryoci has installed into them.

    \b
    Examples:
      cryoci status
      cryoci status --json
    """
    from cryoci.shim.doctor.check import Facts
    from cryoci.shim.setup import engines
    from cryoci.shim.setup.store import Store

    facts = Facts()
    found = engines.status(facts, Store(facts))
    if as_json:
        output.emit_json({"schema": "io.cryoci.status/1", "engines": found})
    elif not found:
        click.echo("no engine is here")
    else:
        keys = ("engine", "version", "state", "detail", "files")
        output.table([k.upper() for k in keys], [[row[k] for k in keys] for row in found])
