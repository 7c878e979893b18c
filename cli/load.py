# SPDX-License-Identifier: Apache-2.0
"""cryoci load: images out of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output


@click.command("load", short_help="Take images out of a file.")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.tar")
@click.argument("target", required=False)
@output.registry_options
@output.json_option
@output.quiet_option
def command(path: Path, target: str | None, as_json: bool, quiet: bool, **where: Any) -> None:
    """Take the images of FILE.tar (`cryoci save`, skopeo's and podman's oci-archive) into the local store.

    With TARGET (NAME, oci:LAYOUT:NAME or HOST/REPO:TAG) its one image goes there. Every blob is verified. What stays
    on this node must pass its policy: a file carries no signature, so a strict one needs a rule that accepts it.

    \b
    Examples:
      cryoci load counter.tar
      cryoci load counter.tar registry.example.com/team/counter:1
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference, shelf
    from cryoci.ociimage.trust.policy import Gate

    goal = reference.parse(target) if target else None
    if isinstance(goal, (reference.DirectoryRef, reference.ArchiveRef)):
        raise UsageError(
            f"{target} is no place for an image", hint=f"to unpack it: cryoci pull {path} {target}"
        )
    options = output.options(**where)
    gate = None if isinstance(goal, reference.RegistryRef) else Gate(reference.ArchiveRef(path), options)
    with output.progress(quiet or as_json) as progress:
        done = shelf.load(path, goal, progress=progress, registry_options=options, gate=gate)
    output.verdict(gate.verdict if gate else None)
    if as_json:
        output.emit_json(done)
        return
    for one in done:
        click.echo(one.names[0] if quiet else f"loaded {one.names[0]}\ndigest {one.digest}")
