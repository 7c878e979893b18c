# SPDX-License-Identifier: Apache-2.0
"""cryoci list (ls): the checkpoint images of a layout or repository, or the archives of a directory."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("list", short_help="List checkpoint images.")
@click.argument("place", required=False)
@output.registry_options
@output.json_option
@output.quiet_option
def command(place: str | None, as_json: bool, quiet: bool, **where: Any) -> None:
    """List the images in PLACE: oci:LAYOUT, or HOST/REPO in a registry. Default: the local store.

    Of a directory (./DIR, such as the kubelet's) the checkpoint archives in it are listed.

    \b
    Examples:
      cryoci list
      cryoci list oci:/backup
      cryoci list --json registry.example.com/team/counter
      cryoci ls /var/lib/kubelet/checkpoints
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import image, reference, shelf

    ref = reference.parse(place) if place else reference.LayoutRef(reference.default_store())
    if isinstance(ref, reference.DirectoryRef):
        _archives(shelf.archives(ref.path), as_json=as_json, quiet=quiet)
        return
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{place} holds no images", hint=f"for an OCI layout write oci:{place}")
    found = image.list_images(ref, registry_options=output.options(**where))
    if as_json:
        output.emit_json(found)
    elif quiet:
        for entry in found:
            click.echo(output.printable(entry.name))
    else:
        output.table(
            ("NAME", "CONTAINER", "ENGINE", "BASE IMAGE", "CREATED", "SIZE", "MEMORY+FILES", "DIGEST"),
            [
                (
                    entry.name,
                    entry.container_name,
                    entry.engine,
                    entry.base_image or entry.problem,
                    entry.created,
                    output.size(entry.size),
                    output.size(entry.raw_size),
                    entry.digest.removeprefix("sha256:")[:12],
                )
                for entry in found
            ],
        )


def _archives(found: Any, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        output.emit_json(found)
    elif quiet:
        for entry in found:
            click.echo(output.printable(str(entry.path)))
    else:
        output.table(
            ("NAMESPACE", "POD", "CONTAINER", "ENGINE", "CHECKPOINTED", "SIZE", "NAME"),
            [
                (
                    entry.namespace,
                    entry.pod,
                    entry.container or entry.problem,
                    entry.engine,
                    entry.checkpointed,
                    output.size(entry.size),
                    entry.path.name,
                )
                for entry in found
            ],
        )
