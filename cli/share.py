# SPDX-License-Identifier: Apache-2.0
"""cryoci share: containers that take turns."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import app_options, output


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
@click.option(
    "--host-memory",
    metavar="SIZE",
    help="Host memory that parked members may take, such as 64G: beyond that the least useful is stored.",
)
@click.option(
    "--reserve",
    metavar="SIZE",
    help="Instead: host memory of the node that stays free. Default: a twentieth of it.",
)
@click.option(
    "--disk", metavar="DIR", help="Store members there, as directories. Default: in the local store."
)
@click.option("--registry", metavar="HOST/REPO", help="Push them there instead.")
@app_options.without
@output.registry_options
@output.metrics_option
def command(
    members: tuple[str, ...],
    active: int,
    policy: Any,
    idle: str | None,
    patience: str,
    host_memory: str | None,
    reserve: str | None,
    disk: str | None,
    registry: str | None,
    no_hooks: bool,
    metrics: str | None,
    **where: Any,
) -> None:
    """Run a proxy in front of containers that cannot all run at once.

    A client that comes for a parked member is held, not refused: another member is parked, this one unparked, and
    then it is served. Members must run or be parked when this starts; they stay as they are when it ends.

    With --host-memory, --reserve, --disk or --registry a parked member for which host memory has no room is
    checkpointed and ended; a client that comes for it has it restored from there.

    What annotations io.cryoci.pre-checkpoint and io.cryoci.post-restore of a member say is done before it is parked
    and after it is unparked: a model server that goes to sleep changes places in a fraction of the time.

    \b
    Examples:
      cryoci share --member llama=8001:8000 --member mistral=8002:8000
      cryoci share --member a=8001:80 --member b=8002:80 --member c=8003:80 --host-memory 64G --disk /srv/parked
      cryoci share --member lab=0.0.0.0:8888:8888 --idle 15m --metrics 127.0.0.1:9464
    """
    import asyncio

    from cryoci import durations
    from cryoci.uses import metrics as numbers
    from cryoci.uses import share, share_member, share_shelf, share_tiers, share_turns, stdio

    options = share_turns.Options(
        active, policy, durations.parse(idle) if idle else None, durations.parse(patience)
    )
    goal = share_shelf.goal(disk, registry)
    limits = share_tiers.Limits.parse(host_memory, reserve, stores=goal is not None)
    found = share_member.parse(members, hooks=not no_hooks)
    with stdio.own() as say:
        shelf = share_shelf.Shelf(goal, say, output.options(**where))
        tiers = share_tiers.Tiers(found, shelf, limits, policy, say)
        made = share.Share(found, options, say, tiers=tiers)
        with tiers.held(), numbers.serving(metrics, made.metrics):
            asyncio.run(made.run())
