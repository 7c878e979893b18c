# SPDX-License-Identifier: Apache-2.0
"""cryoci explain: the cause that a log of CRIU, a runtime or an engine gives."""

from __future__ import annotations

import sys

import click

from cryoci.cli import output


@click.command("explain", short_help="Say why a dump or restore failed, from its log.")
@click.argument("log_file", metavar="LOG|CONTAINER")
@output.json_option
def command(log_file: str, as_json: bool) -> None:
    """Read LOG, a dump.log, a restore.log or what an engine said, and name the cause and the fix. For a CONTAINER,
    by name or id, its last log is read.

    The exit status is 1 when a cause was found, and 0 when the log shows no error.

    \b
    Examples:
      cryoci explain web
      cryoci explain /run/cryoci/containers/default/web/dump.log
      cryoci explain --json restore.log
    """
    from pathlib import Path

    from cryoci.shim import attempts

    named = "/" not in log_file and not Path(log_file).exists()
    show(attempts.log(log_file) if named else log_file, as_json)


def show(log_file: str, as_json: bool) -> None:
    """Explain a log and end with the status that says whether it shows a failure."""
    from cryoci.shim.criu import report

    found = report.explain_file(log_file)
    if as_json:
        output.emit_json(found)
    elif found["cause"] is None:
        click.echo(f"{log_file}: no error in it")
    else:
        cause = found["cause"]
        output.pairs(
            [
                ("cause", cause["summary"]),
                ("fix", cause["hint"]),
                ("line", cause["line"]),
                ("log", log_file),
                ("symptom", f"{cause['id']} ({cause['source']})" if cause["id"] else "not in the catalogue"),
            ]
        )
    sys.exit(0 if found["ok"] else 1)
