# SPDX-License-Identifier: Apache-2.0
"""cryoci rm: remove checkpoint images."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("rm", short_help="Remove checkpoint images.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-i", "--ignore", is_flag=True, help="Do not fail for an image that is not there.")
@output.registry_options
@output.json_option
@output.quiet_option
def command(images: tuple[str, ...], ignore: bool, as_json: bool, quiet: bool, **where: Any) -> None:
    """Remove each IMAGE: NAME in the local store, oci:LAYOUT:NAME, or HOST/REPO:TAG.

    A layout frees the blobs that no other image needs at once. A registry must allow deletion, and frees
    space at its own garbage collection. With the last name of an image its signatures and attestations go too.

    \b
    Examples:
      cryoci rm counter:1
      cryoci rm registry.example.com/team/counter:1
    """
    from cryoci.errors import NotFoundError, UsageError
    from cryoci.ociimage import image, reference

    refs = []
    for text in images:
        ref = reference.parse(text)
        if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
            raise UsageError(
                f"{text} is no image", hint="directories and archives are yours to remove: rm -r"
            )
        refs.append(ref)
    results = []
    for ref in refs:
        try:
            freed = image.remove(ref, registry_options=output.options(**where))
        except NotFoundError:
            if not ignore:
                raise
            continue
        results.append({"reference": str(ref), "freed": freed})
        if not as_json and not quiet:
            click.echo(f"removed {ref}" + (f", freed {output.size(freed)}" if freed else ""))
    if as_json:
        output.emit_json(results)
