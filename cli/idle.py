# SPDX-License-Identifier: Apache-2.0
"""cryoci idle: containers that nobody uses are parked, and come back on demand."""

from __future__ import annotations

import time

import click

from cryoci.cli import app_options, groups, output


@click.group(
    "idle",
    cls=groups.RunByDefault,
    short_help="Park containers that nobody uses, and bring them back on demand.",
)
def command() -> None:
    """Park containers that nobody uses, and bring them back when somebody comes.

    `cryoci idle MEMBER...` is short for `cryoci idle run MEMBER...`, whose --help has its options.

    \b
    Examples:
      cryoci idle lab=0.0.0.0:8888:8888 --jupyter lab=8888 --jupyter-token lab=/etc/cryoci/lab.token
      cryoci idle llama=8001:8000 trainer --after 1h --metrics 127.0.0.1:9464
      cryoci idle status
    """


@command.command("run")
@click.argument("members", nargs=-1, required=True, metavar="NAME[=[ADDRESS:]PORT:CONTAINERPORT]...")
@click.option(
    "--after", default="15m", show_default=True, metavar="TIME", help="Park who was not used for so long."
)
@click.option("--every", default="5s", show_default=True, metavar="TIME", help="Time between two looks.")
@click.option(
    "--jupyter",
    multiple=True,
    metavar="NAME=PORT",
    help="A Jupyter server listens there in the container: ask it for its kernels. Repeatable.",
)
@click.option(
    "--jupyter-token", multiple=True, metavar="NAME=FILE", help="A file with its token. Repeatable."
)
@click.option(
    "--gpu",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, 100, min_open=True),
    help="Percent of a GPU's time from which on the container is used.",
)
@click.option(
    "--cpu",
    default=5.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Percent of one CPU from which on a container without CUDA is used.",
)
@click.option(
    "--ignore",
    multiple=True,
    type=click.Choice(["gpu", "traffic", "cpu"]),
    help="Do not look at that. Repeatable.",
)
@app_options.without
@output.metrics_option
def run(
    members: tuple[str, ...],
    after: str,
    every: str,
    jupyter: tuple[str, ...],
    jupyter_token: tuple[str, ...],
    gpu: float,
    cpu: float,
    ignore: tuple[str, ...],
    no_hooks: bool,
    metrics: str | None,
) -> None:
    """Watch containers, which run or are parked; they stay as they are when this ends.

    A container is used while its GPU works, bytes pass over its connections or new ones come, a Jupyter kernel
    of it is busy, or, without CUDA, a CPU works for it. A client that comes to the port on the node brings it back
    and is served; so does `cryoci unpark NAME`.
    """
    import asyncio

    from cryoci import durations
    from cryoci.uses import idle, share_member, stdio
    from cryoci.uses import metrics as numbers
    from cryoci.uses.idle_probe import Watch

    found = share_member.parse(members, alone=True, hooks=not no_hooks)
    servers = idle.servers([one.name for one in found], jupyter, jupyter_token)
    watches = {one.name: Watch(gpu, cpu, frozenset(ignore), servers.get(one.name)) for one in found}
    options = idle.Options(durations.parse(after), durations.parse(every))
    with stdio.own() as say:
        made = idle.Idle(found, watches, options, say)
        with numbers.serving(metrics, made.metrics):
            asyncio.run(made.run())


@command.command("status")
@click.argument("container", required=False)
@output.json_option
def status(container: str | None, as_json: bool) -> None:
    """Show all containers that are or were watched, or CONTAINER."""
    from cryoci.errors import NotFoundError
    from cryoci.uses import idle_state

    found = [state for state in idle_state.every_state() if container in (None, state.name)]
    if container and not found:
        raise NotFoundError(f"container {container} was never watched", hint=f"cryoci idle {container}")
    if as_json:
        output.emit_json([{"alive": state.alive, "state": state} for state in found])
        return
    now = time.time()
    output.table(
        ("CONTAINER", "STATE", "LAST USED", "BY", "PARK AFTER", "CLIENTS", "PARKS", "NOTE"),
        [
            (
                state.name,
                state.state if state.alive else "not watched",
                f"{output.seconds(max(0.0, now - state.used))} ago",
                state.why,
                output.seconds(state.after),
                state.at,
                str(state.parks),
                state.problem,
            )
            for state in found
        ],
    )
