# SPDX-License-Identifier: Apache-2.0
"""cryoci gc: remove the images that a retention policy lets go."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output


@click.command("gc", short_help="Remove old checkpoint images by a policy.")
@click.argument("place", required=False)
@click.option("--keep-last", type=int, metavar="N", help="Keep the newest N images of each container.")
@click.option("--max-age", metavar="AGE", help="Remove images older than this: 30d, 12h, 2w.")
@click.option("--max-size", metavar="SIZE", help="Remove the oldest until all take at most this: 10G.")
@click.option(
    "--keep", "pins", multiple=True, metavar="PATTERN", help="Names that stay, as in sh; repeatable."
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would go.")
@output.registry_options
@output.json_option
@output.quiet_option
def command(place: str | None, as_json: bool, quiet: bool, **rest: Any) -> None:
    """Remove images of PLACE (oci:LAYOUT or HOST/REPO; default: the local store) that no rule keeps.

    An image goes when any rule lets it go and no pin holds it (--keep here, or `cryoci tag --pin NAME` in a
    layout). The newest image of a container stays, unless --keep-last is 0. Without rules a layout only
    frees the blobs that no image needs.

    \b
    Examples:
      cryoci gc --keep-last 3
      cryoci gc --max-age 30d --max-size 100G --keep 'release-*' --dry-run
      cryoci gc registry.example.com/team/counter --keep-last 5
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference, retention

    ref = reference.parse(place) if place else reference.LayoutRef(reference.default_store())
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{place} holds no images", hint=f"for an OCI layout write oci:{place}")
    last, age, size = rest.pop("keep_last"), rest.pop("max_age"), rest.pop("max_size")
    policy = retention.Policy(
        last,
        retention.parse_age(age) if age else None,
        retention.parse_bytes(size) if size else None,
        rest.pop("pins"),
    )
    dry = rest.pop("dry_run")
    done = retention.collect(ref, policy, dry=dry, registry_options=output.options(**rest))
    if as_json:
        output.emit_json(done)
        return
    for verdict in done.verdicts:
        if quiet and not verdict.goes:
            continue
        word = "removed" if verdict.removed else "would remove" if verdict.goes else "keep"
        line = (
            verdict.name if quiet else f"{word} {verdict.name} ({output.size(verdict.size)}): {verdict.why}"
        )
        click.echo(output.printable(line))
    if done.freed and not quiet:
        click.echo(f"freed {output.size(done.freed)}")
