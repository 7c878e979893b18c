# SPDX-License-Identifier: Apache-2.0
"""cryoci inspect: what a checkpoint image says about itself, without fetching its memory."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("inspect", short_help="Show what a checkpoint image holds.")
@click.argument("image_ref", metavar="IMAGE")
@click.option("--annotations", "show_annotations", is_flag=True, help="Show every annotation.")
@output.registry_options
@output.json_option
def command(image_ref: str, show_annotations: bool, as_json: bool, **where: Any) -> None:
    """Show IMAGE: NAME in the local store, oci:LAYOUT:NAME, or HOST/REPO:TAG.

    Only its manifest and its small first layer are read, so this is quick for an image of any size.

    \b
    Examples:
      cryoci inspect counter:1
      cryoci inspect --json registry.example.com/team/counter:1
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import image, reference

    ref = reference.parse(image_ref)
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{image_ref} is no image", hint="push it first: cryoci push SOURCE NAME")
    info = image.inspect(ref, registry_options=output.options(**where))
    if as_json:
        output.emit_json(info)
        return
    output.pairs(
        [
            ("image", info.reference),
            ("digest", info.digest),
            ("manifest", info.manifest_digest),
            ("created", info.created),
            ("container", f"{info.container_name} {info.container_id[:12]}".strip()),
            ("engine", " ".join(filter(None, (info.engine, info.facts.get("engine.version", ""))))),
            ("base image", info.base_image),
            ("base digest", info.base_digest),
            ("runtime", " ".join(filter(None, (info.runtime, info.facts.get("runtime.version", ""))))),
            ("criu", info.criu_version),
            ("host", " ".join(filter(None, (info.architecture, info.facts.get("host.kernel", ""))))),
            ("pod", "/".join(filter(None, (info.facts.get("pod.namespace"), info.facts.get("pod.name"))))),
            ("size", f"{output.size(info.size)} ({output.size(info.raw_size)} unpacked)"),
        ]
    )
    click.echo()
    output.table(
        ("LAYER", "SIZE", "UNPACKED", "DIGEST"),
        [
            (
                layer.holds or layer.media_type,
                output.size(layer.size),
                output.size(layer.raw_size),
                layer.digest,
            )
            for layer in info.layers
        ],
    )
    if show_annotations:
        click.echo()
        output.pairs(sorted(info.annotations.items()))
