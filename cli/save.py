# SPDX-License-Identifier: Apache-2.0
"""cryoci save: an image as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output


@click.command("save", short_help="Write an image to one file.")
@click.argument("image_ref", metavar="IMAGE")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.tar")
@output.registry_options
@output.json_option
@output.quiet_option
def command(image_ref: str, path: Path, as_json: bool, quiet: bool, **where: Any) -> None:
    """Write IMAGE to FILE.tar: an OCI archive for `cryoci load`, skopeo, podman and containerd.

    Nothing is compressed again, and digests stay. For an archive as engines export it use `cryoci pull`.

    \b
    Examples:
      cryoci save counter:1 /mnt/stick/counter.tar
      cryoci save registry.example.com/team/counter:1 counter.tar
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference, shelf

    ref = reference.parse(image_ref)
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{image_ref} is no image", hint="push it first: cryoci push SOURCE NAME")
    with output.progress(quiet or as_json) as progress:
        done = shelf.save(ref, path, progress=progress, registry_options=output.options(**where))
    if as_json:
        output.emit_json(done)
    else:
        click.echo(str(path) if quiet else f"saved {path}: {output.size(done.size)}\ndigest {done.digest}")
