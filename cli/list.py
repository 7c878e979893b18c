# SPDX-License-Identifier: Apache-2.0
"""cryoci list (ls): the checkpoint images of a layout or repository, or the archives of a directory."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("list", short_help="List checkpoint images.")
@click.argument("places", metavar="[PLACE]...", nargs=-1)
@output.registry_options
@output.json_option
@output.quiet_option
def command(places: tuple[str, ...], as_json: bool, quiet: bool, **where: Any) -> None:
    """List the images in PLACE: oci:LAYOUT, or HOST/REPO in a registry. Default: the local store.

    Of directories (./DIR, such as the kubelet's), of which there may be several, the checkpoint archives are listed.

    \b
    Examples:
      cryoci list
      cryoci list oci:/backup
      cryoci list --json registry.example.com/team/counter
      cryoci ls /var/lib/kubelet/checkpoints /srv/checkpoints
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import image, reference, shelf

    refs = [reference.parse(place) for place in places]
    directories = [ref.path for ref in refs if isinstance(ref, reference.DirectoryRef)]
    if directories and len(directories) == len(refs):
        found = [entry for path in directories for entry in shelf.archives(path)]
        _archives(found, as_json=as_json, quiet=quiet, places=len(directories))
        return
    if len(refs) > 1:
        raise UsageError("only directories are listed together", hint=f"cryoci list {places[0]}")
    ref = refs[0] if refs else reference.LayoutRef(reference.default_store())
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{places[0]} holds no images", hint=f"for an OCI layout write oci:{places[0]}")
    images = image.list_images(ref, registry_options=output.options(**where))
    if as_json:
        output.emit_json(images)
    elif quiet:
        for entry in images:
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
                for entry in images
            ],
        )


def _archives(found: Any, *, as_json: bool, quiet: bool, places: int) -> None:
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
                    entry.path.name if places == 1 else str(entry.path),
                )
                for entry in found
            ],
        )
