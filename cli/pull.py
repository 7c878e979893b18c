# SPDX-License-Identifier: Apache-2.0
"""cryoci pull: a checkpoint image to a directory, the local store, or another layout."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output, sealing, told


@click.command("pull", short_help="Fetch a checkpoint image, every byte verified.")
@click.argument("source")
@click.argument("target", required=False)
@sealing.decrypt_options
@output.registry_options
@told.options
@output.json_option
@output.quiet_option
def command(source: str, target: str | None, as_json: bool, quiet: bool, **where: Any) -> None:
    """Fetch the image SOURCE to TARGET.

    SOURCE is HOST/REPO:TAG, HOST/REPO@DIGEST, oci:LAYOUT:NAME, a NAME in the local store, or an engine's
    archive. TARGET is a directory to make (./DIR), an archive to make (FILE.tar, .tar.gz, .tar.zst) as
    engines and checkpointctl read it, or a layout or NAME to copy the image to, digests unchanged. Without
    TARGET the image goes to the local store as REPO:TAG.

    The directory appears only when every blob had its digest and every file a place in a checkpoint. A pull that
    was killed is taken up by the next one of the same image to the same place.

    \b
    Examples:
      cryoci pull registry.example.com/team/counter:1
      cryoci pull registry.example.com/team/counter:1 ./checkpoint
      cryoci pull registry.example.com/team/counter@sha256:0123... oci:/backup:counter
      cryoci pull counter:1 /tmp/counter.tar && checkpointctl show /tmp/counter.tar
      cryoci pull /tmp/podman-export.tar.gz ./checkpoint
    """
    from contextlib import nullcontext

    from cryoci import trace
    from cryoci.cli.signals import unwinding
    from cryoci.errors import UsageError
    from cryoci.files import scratch
    from cryoci.ociimage import image, reference
    from cryoci.ociimage.export import export
    from cryoci.ociimage.trust.policy import Gate

    origin = reference.parse(source)
    if isinstance(origin, reference.DirectoryRef):
        raise UsageError(
            f"{source} is a directory already", hint="pull from HOST/REPO:TAG, NAME or FILE.tar"
        )
    goal = reference.parse(target) if target else _stored(origin, source)
    identities = sealing.identities(where, node=True)
    page = told.take(where)
    options = output.options(**where)
    gate = Gate(origin, options)
    # what was decrypted is no use to a later pull, so nothing that can be caught may leave it on the disk
    ended = unwinding() if identities else nullcontext()
    about = told.about(f"cryoci pull {source}", page, registry=options, identities=identities)
    with (
        ended,
        about as done,
        output.progress(quiet or as_json) as progress,
        trace.span("pull", bytes=0) as moved,
    ):
        if isinstance(goal, reference.DirectoryRef):
            pulled = image.pull(
                origin,
                goal.path,
                progress=progress,
                registry_options=options,
                gate=gate,
                identities=identities,
            )
            done.seconds, moved["bytes"] = {"pull": pulled.seconds}, pulled.raw_size
            _report(pulled, str(pulled.directory), pulled.raw_size, as_json=as_json, quiet=quiet)
        elif isinstance(goal, reference.ArchiveRef):
            with scratch("pull.") as place:
                made = image.pull(
                    origin,
                    place / "checkpoint",
                    progress=progress,
                    registry_options=options,
                    gate=gate,
                    identities=identities,
                )
                exported = export(made.directory, goal, progress=progress)
                done.seconds, moved["bytes"] = {"pull": made.seconds}, made.raw_size
            if as_json:
                output.emit_json(exported)
            else:
                click.echo(str(goal) if quiet else f"pulled {goal}: {output.size(exported.size)}")
        elif isinstance(origin, reference.ArchiveRef):
            raise UsageError(
                f"cannot pull {source} to {target}", hint="use push to make an image of an archive"
            )
        else:
            copied = image.copy(origin, goal, progress=progress, registry_options=options, gate=gate)
            done.seconds, moved["bytes"] = {"copy": copied.seconds}, copied.size
            _report(copied, copied.reference, copied.size, as_json=as_json, quiet=quiet)
        done.ref = goal
    output.verdict(gate.verdict)


def _stored(origin: Any, source: str) -> Any:
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference

    if not isinstance(origin, reference.RegistryRef):
        raise UsageError(f"where should {source} go?", hint=f"cryoci pull {source} ./DIR")
    return reference.LayoutRef(reference.default_store(), f"{origin.repository}:{origin.tag or 'latest'}")


def _report(result: Any, place: str, size: int, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        output.emit_json(result)
    elif quiet:
        click.echo(place)
    else:
        speed = output.rate(size, result.seconds)
        there = f", {output.size(result.skipped)} were there" if result.skipped else ""
        click.echo(
            f"pulled {place}: {output.size(size)} in {output.seconds(result.seconds)} ({speed}){there}"
        )
        click.echo(f"digest {result.digest}")
