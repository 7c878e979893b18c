# SPDX-License-Identifier: Apache-2.0
"""cryoci share: containers that take turns."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("share", short_help="Let containers take turns on a GPU: requests bring in who is parked.")
@click.option(
    "--member",
    "members",
    multiple=True,
    required=True,
    metavar="NAME=PORT:CONTAINERPORT",
    help="A container, the port (or ADDRESS:PORT) where its clients come in, and its own; repeatable.",
)
@click.option(
    "--active", default=1, show_default=True, type=click.IntRange(1), help="Members that run at a time."
)
@click.option(
    "--policy",
    type=click.Choice(["lru", "priority", "round-robin"]),
    default="lru",
    show_default=True,
    help="Who is parked for another: the least recently used, the last on the command line, or who has run longest.",
)
@click.option(
    "--idle", metavar="TIME", help="Park who was not used for so long, even if nobody needs its place."
)
@click.option(
    "--patience",
    default="2s",
    show_default=True,
    metavar="TIME",
    help="How long a member in use keeps its place while others wait for it; then it is parked.",
)
@output.metrics_option
def command(
    members: tuple[str, ...], active: int, policy: Any, idle: str | None, patience: str, metrics: str | None
) -> None:
    """Run a proxy in front of containers that cannot all run at once.

    A client that comes for a parked member is held, not refused: another member is parked, this one unparked, and
    then it is served. Members must run or be parked when this starts; they stay as they are when it ends.

    \b
    Examples:
      cryoci share --member llama=8001:8000 --member mistral=8002:8000
      cryoci share --member lab=0.0.0.0:8888:8888 --idle 15m --metrics 127.0.0.1:9464
    """
    import asyncio

    from cryoci import durations
    from cryoci.uses import metrics as numbers
    from cryoci.uses import share, share_member

    options = share.Options(
        active, policy, durations.parse(idle) if idle else None, durations.parse(patience)
    )
    made = share.Share(share_member.parse(members), options, click.echo)
    with numbers.serving(metrics, made.metrics):
        asyncio.run(made.run())
