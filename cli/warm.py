# SPDX-License-Identifier: Apache-2.0
"""cryoci warm: images and their base images on this node, before a restore needs them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from cryoci.cli import output


@click.command("warm", short_help="Fetch images and their base images, so that a restore needs no registry.")
@click.argument("images", nargs=-1, metavar="[REF...]")
@click.option(
    "--to",
    "place",
    type=click.Choice(["cache", "unpacked", "tmpfs"]),
    default="cache",
    show_default=True,
    help="cache: the local store and the page cache, from which the kernel may evict it; unpacked: that, and unpacked "
    "beside it, so that a restore has nothing to unpack; tmpfs: memory, where it stays until it is dropped or the "
    "node restarts.",
)
@click.option(
    "--limit",
    metavar="SIZE",
    help="Of all images in tmpfs together, like 8G. Default: what it was, or a quarter of the memory.",
)
@click.option("--list", "listed", is_flag=True, help="Show what is unpacked or in tmpfs.")
@click.option(
    "--drop", is_flag=True, help="Remove what is unpacked of REF, and take it out of tmpfs; all without REF."
)
@output.registry_options
@output.json_option
@output.quiet_option
def command(
    images: tuple[str, ...],
    place: str,
    limit: str | None,
    listed: bool,
    drop: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Fetch each checkpoint image REF to this node, and its base image into podman.

    With --to cache it goes to the local store: restore it by the name that is printed, and no registry is asked.
    With --to unpacked it also lies there as a directory that only root can read: verified once, compared with fast
    sums by each restore, which has nothing to unpack. It takes its room on the disk a second time.
    With --to tmpfs its layers stay in memory, and whatever reads REF here (restore, pull, inspect) takes them from
    there, verified as ever; a registry is asked for the manifest alone. What is there already is not fetched again.

    \b
    Examples:
      cryoci warm registry.example:5000/warm/llm:1
      cryoci restore warm/llm:1 --detach
      cryoci warm --to unpacked warm/llm:1
      cryoci warm --to tmpfs --limit 40G registry.example:5000/warm/llm:1
      cryoci warm --list
      cryoci warm --drop registry.example:5000/warm/llm:1
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference
    from cryoci.ociimage.trust.policy import Gate
    from cryoci.shim.criu.options import parse_size
    from cryoci.uses import warm, warm_memory, warm_unpacked

    refs = [reference.parse(text) for text in images]
    if listed and (images or drop):
        raise UsageError("--list shows all and does nothing else", hint="leave out REF and --drop")
    if listed:
        _list(warm_memory.usage(), warm_unpacked.usage(), as_json=as_json)
        return
    if drop:
        known = [ref for ref in refs if isinstance(ref, (reference.LayoutRef, reference.RegistryRef))]
        if len(known) < len(refs):
            raise UsageError("only images are warm", hint="see `cryoci warm --list`")
        gone = warm.drop(known)
        output.emit_json(gone) if as_json else click.echo("\n".join(gone) if gone else "nothing was warm")
        return
    if not refs:
        raise UsageError("which image?", hint="cryoci warm REF, or cryoci warm --list")
    if limit and place != "tmpfs":
        raise UsageError("--limit is for --to tmpfs: the kernel rules the page cache", hint="leave it out")
    most = parse_size(limit, "--limit") if limit else None
    options = output.options(**where)
    done = []
    with output.progress(quiet or as_json) as progress:
        for ref in refs:
            gate = Gate(
                ref, options
            )  # what is in memory is known by its registry's name, and judged at the restore
            if place == "tmpfs":
                done.append(warm.hold(ref, most, progress=progress, registry_options=options))
            elif place == "unpacked":
                done.append(warm.unpack(ref, progress=progress, registry_options=options, gate=gate))
            else:
                done.append(warm.warm(ref, progress=progress, registry_options=options, gate=gate))
            output.verdict(gate.verdict)
            if quiet:
                click.echo(done[-1].name)
            elif not as_json:
                _say(done[-1])
    if as_json:
        output.emit_json(done)


def _say(one: Any) -> None:
    base = f", base image {'pulled' if one.base_pulled else 'is here'}" if one.base else ""
    where = " in memory" if one.place == "tmpfs" else ""
    sizes = f"{output.size(one.size)}{where}, {output.size(one.fetched)} fetched"
    sizes += f", {output.size(one.unpacked)} unpacked" if one.unpacked else ""
    click.echo(f"warm {one.name}: {sizes}{base}, in {output.seconds(one.seconds)}")


def _list(found: Any, unpacked: Any, *, as_json: bool) -> None:
    if as_json:
        output.emit_json({**asdict(found), "unpacked": unpacked})
        return
    places = (("tmpfs", found.images), ("unpacked", unpacked))
    rows = [
        (one.reference, place, output.size(one.size), one.digest) for place, all_ in places for one in all_
    ]
    output.table(("IMAGE", "PLACE", "SIZE", "DIGEST"), rows)
    if found.limit:
        click.echo(f"{output.size(found.used)} of {output.size(found.limit)} of memory")
