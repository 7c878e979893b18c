# SPDX-License-Identifier: Apache-2.0
"""cryoci agent: the checkpoint archives of this node's kubelet as images in a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output


@click.command("agent", short_help="Push the checkpoints that this node's kubelet makes.")
@click.option(
    "--directory",
    default="/var/lib/kubelet/checkpoints",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the kubelet puts archives.",
)
@click.option(
    "--to", required=True, metavar="HOST/REPO", envvar="CRYOCI_AGENT_TO", help="Where to push images."
)
@click.option(
    "--keep",
    type=click.IntRange(0),
    metavar="N",
    envvar="CRYOCI_AGENT_KEEP",
    help="Remove archives once pushed, but for the newest N of each container. Default: remove none.",
)
@click.option(
    "--settle", default="3s", show_default=True, metavar="TIME", help="Unchanged so long, it is complete."
)
@click.option("--compression", default="zstd:1", show_default=True, help="zstd:LEVEL, gzip:LEVEL or none.")
@output.metrics_option
@output.registry_options
def command(directory: Path, to: str, keep: int | None, settle: str, compression: str, **where: Any) -> None:
    """Watch the kubelet's checkpoint directory and push each archive to HOST/REPO:POD_NAMESPACE-CONTAINER-TIME.

    Runs until it is ended. Killed at any point and started again, it goes on; an archive is never removed
    before its image is in the registry and read back.

    \b
    Examples:
      cryoci agent --to registry.example:5000/checkpoints --keep 1
    """
    from cryoci import durations
    from cryoci.cli.signals import unwinding
    from cryoci.uses import agent, metrics

    address = where.pop("metrics")

    options = agent.Options(
        directory,
        to,
        keep,
        durations.parse(settle),
        compression=compression,
        registry=output.options(**where),
    )
    with unwinding():
        made = agent.Agent(options, click.echo, output.work(click.echo, output.terminal()))
        with metrics.serving(address, made.metrics):
            made.run()
