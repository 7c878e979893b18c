# SPDX-License-Identifier: Apache-2.0
"""cryoci warm: images and their base images on this node, before a restore needs them."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("warm", short_help="Fetch images and their base images, so that a restore needs no registry.")
@click.argument("images", nargs=-1, required=True, metavar="REF...")
@output.registry_options
@output.json_option
@output.quiet_option
def command(images: tuple[str, ...], as_json: bool, quiet: bool, **where: Any) -> None:
    """Fetch each checkpoint image REF into the local store and the page cache, and its base image into podman.

    What is there already is not fetched again, but read once more. Restore by the name that is printed.

    \b
    Examples:
      cryoci warm registry.example:5000/warm/llm:1
      cryoci restore warm/llm:1 --detach
    """
    from cryoci.ociimage import reference
    from cryoci.uses import warm

    refs = [reference.parse(text) for text in images]
    options = output.options(**where)
    done = []
    with output.progress(quiet or as_json) as progress:
        for ref in refs:
            done.append(warm.warm(ref, progress=progress, registry_options=options))
            if quiet:
                click.echo(done[-1].name)
            elif not as_json:
                one = done[-1]
                base = f", base image {'pulled' if one.base_pulled else 'is here'}" if one.base else ""
                sizes = f"{output.size(one.size)}, {output.size(one.fetched)} fetched"
                click.echo(f"warm {one.name}: {sizes}{base}, in {output.seconds(one.seconds)}")
    if as_json:
        output.emit_json(done)
