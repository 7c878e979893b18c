# SPDX-License-Identifier: Apache-2.0
"""cryoci copy: an image from place to place as it is."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("copy", short_help="Copy an image as it is.")
@click.argument("source")
@click.argument("target")
@output.registry_options
@output.json_option
@output.quiet_option
def command(source: str, target: str, as_json: bool, quiet: bool, **where: Any) -> None:
    """Copy the image SOURCE to TARGET, both NAME, oci:LAYOUT:NAME or HOST/REPO:TAG.

    Nothing is compressed again, so digests stay; blobs that TARGET has are skipped, every other is verified. A copy
    that was killed goes on where it was. What comes to this node must pass its policy, as with `cryoci pull`.

    \b
    Examples:
      cryoci copy counter:1 oci:/backup:counter-1
      cryoci copy registry-a.example.com/counter:1 registry-b.example.com/counter:1
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import image, reference
    from cryoci.ociimage.trust.policy import Gate

    places = []
    for text in (source, target):
        ref = reference.parse(text)
        if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
            raise UsageError(
                f"{text} is no image", hint="directories and archives: cryoci push, cryoci pull"
            )
        places.append(ref)
    origin, goal = places
    options = output.options(**where)
    # what comes to this node is judged; who copies between registries leaves that to those who will use it
    gate = Gate(origin, options) if isinstance(goal, reference.LayoutRef) else None
    with output.progress(quiet or as_json) as progress:
        done = image.copy(origin, goal, progress=progress, registry_options=options, gate=gate)
    output.verdict(gate.verdict if gate else None)
    if as_json:
        output.emit_json(done)
    elif quiet:
        click.echo(done.digest)
    else:
        there = f", {output.size(done.skipped)} were there" if done.skipped else ""
        click.echo(
            f"copied {done.reference}: {output.size(done.size)} in {output.seconds(done.seconds)}{there}"
        )
        click.echo(f"digest {done.digest}")
