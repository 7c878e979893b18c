# SPDX-License-Identifier: Apache-2.0
"""cryoci convert: a checkpoint of one engine in the form of another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output, sealing


@click.command("convert", short_help="Turn one engine's checkpoint into another's.")
@click.argument("source")
@click.option(
    "--to",
    "engine",
    type=click.Choice(["crio", "podman", "containerd", "ctr"]),
    required=True,
    help="Whose archive to write. containerd: for its CRI (2.1 to 2.3); ctr: an image archive for "
    "`ctr image import` and `ctr container restore` of any version.",
)
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file to write; .gz or .zst compresses it (podman).",
)
@click.option(
    "--base-image", metavar="NAME", help="Base image to restore onto. Default: the checkpoint's own."
)
@click.option("--base-id", metavar="ID", default="", help="Its id, which podman and CRI-O need.")
@click.option("--base-digest", metavar="DIGEST", default="", help="Its manifest digest.")
@click.option("--strict", is_flag=True, help="Fail when anything cannot be carried.")
@sealing.decrypt_options
@output.registry_options
@output.json_option
@output.quiet_option
def command(source: str, engine: str, target: Path, as_json: bool, quiet: bool, **rest: Any) -> None:
    """Write SOURCE (an archive, directory or image of any engine) as an archive of another engine.

    The CRIU images stay as they are; names, descriptions and the changes to the file system are put in the
    other engine's words. What it has no place for is listed, and so is what had to be assumed. The node's policy
    (/etc/cryoci/policy.toml) is asked first, as by `cryoci pull`: the other engine restores without asking it.

    \b
    Examples:
      cryoci convert web.tar.zst --to containerd -o web-containerd.tar
      cryoci convert counter:1 --to podman -o counter.tar.zst && podman container restore -i counter.tar.zst
      cryoci convert ./bare --to podman --base-image debian:13 --base-id 0123... -o bare.tar
      cryoci convert web.tar.zst --to ctr -o web.tar && ctr image import --all-platforms web.tar
    """
    from contextlib import nullcontext

    from cryoci.cli.signals import unwinding
    from cryoci.ociimage import reference
    from cryoci.ociimage.conversion import Wanted, convert_to_archive
    from cryoci.ociimage.trust.policy import Gate

    base = (rest.pop("base_image"), rest.pop("base_id"), rest.pop("base_digest"))
    strict = rest.pop("strict")
    identities = sealing.identities(rest, node=True)
    gate = Gate(reference.parse(source), output.options(**rest))
    # what was decrypted lies in a scratch directory, which nothing that can be caught may leave on the disk
    with unwinding() if identities else nullcontext(), output.progress(quiet or as_json) as progress:
        done = convert_to_archive(
            gate.ref,
            Wanted(engine, target, *base, strict=strict),
            progress=progress,
            registry_options=gate.options,
            gate=gate,
            identities=identities,
        )
    output.verdict(gate.verdict)
    if as_json:
        output.emit_json(done)
    elif quiet:
        click.echo(done.path)
    else:
        click.echo(f"wrote {done.path}: {output.size(done.size)}, for {done.dialect}")
        for lost in done.lost:
            click.echo(output.printable(f"not carried: {lost.what}: {lost.why}"))
        for line in done.assumed:
            click.echo(output.printable(f"assumed: {line}"))
