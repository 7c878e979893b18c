# SPDX-License-Identifier: Apache-2.0
"""cryoci show: checkpoints, a line each."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output, sealing


@click.command("show", short_help="Show checkpoints, a line each.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@sealing.decrypt_options
@output.registry_options
@output.json_option
def command(references: tuple[str, ...], as_json: bool, **where: Any) -> None:
    """Show each REF (image, directory or archive) in one line: whose it is, of what, when, how large.

    \b
    Examples:
      cryoci show counter:1 ./podman-export.tar.zst
      cryoci show --json /var/lib/kubelet/checkpoints/*.tar
    """
    from cryoci.ociimage import reference, report

    identities, options = sealing.identities(where), output.options(**where)
    with output.progress(as_json) as progress:
        found = [
            report.inspect(
                reference.parse(text), progress=progress, registry_options=options, identities=identities
            )
            for text in references
        ]
    if as_json:
        output.emit_json([report.overview(one) for one in found])
        return
    addressed = ["ADDRESS"] if any(one.network for one in found) else []
    output.table(
        (
            *("CONTAINER", "IMAGE", "ID", "RUNTIME", "CREATED", "CHECKPOINTED", "ENGINE", "MEMORY", "FILES"),
            *addressed,
        ),
        [
            (
                one.container["name"],
                one.base_image["name"],
                one.container["id"][:12],
                one.runtime,
                one.created,
                one.checkpointed,
                one.engine,
                output.size(one.sizes.memory),
                output.size(one.sizes.rootfs),
                *(" ".join(word for words in one.network.values() for word in words) for _ in addressed),
            )
            for one in found
        ],
    )
