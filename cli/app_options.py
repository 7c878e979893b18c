# SPDX-License-Identifier: Apache-2.0
"""Options about app hooks: steps that an application does before a checkpoint and after a restore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cryoci import durations
from cryoci.shim import app

without = click.option("--no-hooks", is_flag=True, help="Do no steps, whatever annotations say.")


def hooks(*kinds: app.Kind) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options for hooks of `kinds`."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        options = [
            *(
                click.option(
                    f"--{kind}",
                    metavar="STEP",
                    multiple=True,
                    help="exec: ARGV, signal: NAME, http: METHOD URL or wait: TIME, instead of annotation "
                    f"{app.PREFIX}{kind}; repeatable.",
                )
                for kind in kinds
            ),
            click.option("--hook-timeout", metavar="TIME", help="Time that each step may take (30s)."),
            click.option(
                "--hook-failure",
                type=click.Choice(["fail", "ignore"]),
                help="Whether a step that fails is a failure (default), or only told.",
            ),
            without,
        ]
        for option in reversed(options):
            command = option(command)
        return command

    return add


def take(values: dict[str, Any]) -> app.Choice:
    """What a command's keyword arguments say about hooks; these are taken out of `values`."""
    timeout = values.pop("hook_timeout", None)
    return app.Choice(
        pre_checkpoint=values.pop("pre_checkpoint", ()) or None,
        post_restore=values.pop("post_restore", ()) or None,
        timeout=durations.parse(timeout) if timeout else None,
        on_failure=values.pop("hook_failure", None),
        off=values.pop("no_hooks", False),
    )
