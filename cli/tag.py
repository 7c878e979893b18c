# SPDX-License-Identifier: Apache-2.0
"""cryoci tag: another name for an image, and pins that keep it."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("tag", short_help="Give an image another name, or pin it.")
@click.argument("image_ref", metavar="IMAGE")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--pin/--unpin", default=None, help="Keep the image whatever `cryoci gc` is told, or no longer."
)
@output.registry_options
@output.json_option
@output.quiet_option
def command(
    image_ref: str, names: tuple[str, ...], pin: bool | None, as_json: bool, quiet: bool, **where: Any
) -> None:
    """Give IMAGE each NAME too: a tag in the same layout or repository. Nothing is copied.

    With --pin and --unpin, IMAGE itself (or each NAME) is pinned or let go; layouts keep pins, registries
    cannot.

    \b
    Examples:
      cryoci tag counter:1 counter:stable
      cryoci tag --pin counter:stable
      cryoci tag registry.example.com/team/counter:1 stable
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference, shelf

    ref = reference.parse(image_ref)
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{image_ref} is no image", hint="push it first: cryoci push SOURCE NAME")
    if not names and pin is None:
        raise UsageError("which name should it get?", hint=f"cryoci tag {image_ref} NAME, or --pin")
    done = shelf.tag(ref, names, pin=pin, registry_options=output.options(**where))
    if as_json:
        output.emit_json(done)
    elif not quiet:
        for name in done.names:
            state = "" if pin is None else ", pinned" if pin else ", not pinned"
            click.echo(output.printable(f"{name} is {done.digest}{state}"))
