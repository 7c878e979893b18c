# SPDX-License-Identifier: Apache-2.0
"""cryoci agent: the checkpoint archives of this node's kubelet as images in a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output, sealing, secrets


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
@click.option(
    "--sign-key",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    envvar="CRYOCI_AGENT_SIGN_KEY",
    help="Sign each image with this private key, one that cosign or `cryoci keygen` made.",
)
@secrets.password_option
@click.option(
    "--provenance/--no-provenance",
    default=True,
    show_default=True,
    help="With --sign-key, state as well where an image comes from: node, engine, versions, base image.",
)
@click.option(
    "--node",
    metavar="NAME",
    envvar="CRYOCI_AGENT_NODE",
    help="This node's name in the cluster, for provenance and labels. Default: the host's name.",
)
@click.option(
    "--label-node",
    is_flag=True,
    envvar="CRYOCI_AGENT_LABEL_NODE",
    help="Label the node with its GPUs' chip and driver, by which restores are scheduled.",
)
@sealing.encrypt_option
@output.metrics_option
@output.registry_options
def command(
    directory: Path,
    to: str,
    keep: int | None,
    settle: str,
    compression: str,
    sign_key: Path | None,
    password_file: Path | None,
    provenance: bool,
    node: str | None,
    label_node: bool,
    encrypt_to: tuple[str, ...],
    **where: Any,
) -> None:
    """Watch the kubelet's checkpoint directory and push each archive to HOST/REPO:POD_NAMESPACE-CONTAINER-TIME.

    Archives are CRI-O's, containerd's or podman's. Runs until it is ended. Killed at any point and started again, it
    goes on; an archive is never removed before its image is in the registry and read back, and with --sign-key signed.

    \b
    Examples:
      cryoci agent --to registry.example:5000/checkpoints --keep 1
      cryoci agent --to registry.example:5000/checkpoints --sign-key /keys/cosign.key --password-file /keys/password
      cryoci agent --to registry.example:5000/checkpoints --encrypt-to age1...
    """
    import socket

    from cryoci import durations
    from cryoci.cli.signals import unwinding
    from cryoci.uses import agent, metrics

    address = where.pop("metrics")
    name = node or socket.gethostname()
    key, labeller = None, None
    if sign_key is not None:
        from cryoci.ociimage.trust import keys

        key = keys.load_private(
            sign_key, lambda: secrets.password(password_file, f"Password for {sign_key}")
        )
    if label_node:
        from cryoci.uses.node_labels import Labeller

        labeller = Labeller(name, click.echo)
    options = agent.Options(
        directory,
        to,
        keep,
        durations.parse(settle),
        compression=compression,
        registry=output.options(**where),
        key=key,
        provenance=provenance,
        node=name,
        encrypt_to=sealing.recipients(encrypt_to),
    )
    with unwinding():
        made = agent.Agent(options, click.echo, labeller, output.work(click.echo, output.terminal()))
        with metrics.serving(address, made.metrics):
            made.run()
