# SPDX-License-Identifier: Apache-2.0
"""cryoci restore: a checkpoint becomes a running container on this node."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from cryoci.cli import app_options, criu_options, output, sealing, told


@click.command("restore", short_help="Restore a checkpoint as a running container.")
@click.argument("ref")
@click.option("--name", help="Name (podman) or id (runc, crun) of the new container. Default: the old one.")
@click.option("--hostname", metavar="NAME", help="Host name inside of the container. Default: as it was.")
@click.option(
    "-d", "--detach", is_flag=True, help="Return when it runs, instead of following it to its end."
)
@click.option(
    "--engine",
    type=click.Choice(["podman", "runc", "crun"]),
    help="Default: the checkpoint's; for one of CRI-O or containerd podman, else runc or crun.",
)
@click.option("--runtime", help="OCI runtime of the new container. Default: the checkpoint's.")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Bundle of this node for a bare container. Default: one is made from the checkpoint.",
)
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(["mounts", "devices", "host-namespaces", "privileged"]),
    help="What the checkpoint may take from this node, when you trust its maker; repeatable.",
)
@click.option(
    "--device-map",
    default="auto",
    show_default=True,
    metavar="auto|OLD=NEW,...",
    help="Which GPU here stands for which of the checkpoint, by UUID or index; auto: the same one, else the one "
    "of the same chip with the most free memory.",
)
@app_options.hooks("post-restore")
@sealing.decrypt_options
@criu_options.for_restore
@output.registry_options
@told.options
@output.json_option
@output.quiet_option
def command(ref: str, detach: bool, as_json: bool, quiet: bool, **rest: Any) -> None:
    """Restore the checkpoint REF: a container that runs on where it was.

    Every byte is verified against its digest before CRIU sees it. The base image is looked up on this node by
    its id, else pulled by its digest. Devices, hooks, host directories and annotations are never taken from
    the checkpoint (see --allow). After a failure nothing is left on this node.

    A checkpoint of CRI-O or containerd is converted on the way, and restored under podman when it is installed, else
    under runc or crun with the base image of its registry.

    \b
    Examples:
      cryoci restore web --detach
      cryoci restore registry.example:5000/checkpoints/web:1 --name web2 --detach
      cryoci restore ./db-checkpoint --engine runc --bundle /srv/db
      cryoci restore /var/lib/kubelet/checkpoints/checkpoint-web_team-app-2026-11-25T10:00:00Z.tar --detach
    """
    from cryoci import trace
    from cryoci.cli.signals import settle, unwinding
    from cryoci.files import scratch
    from cryoci.ociimage import archive, reference, unpack  # not image: a restore pushes nothing
    from cryoci.ociimage.trust.policy import Gate
    from cryoci.shim.engines.options import RestoreOptions
    from cryoci.shim.engines.restore import need_root, restore
    from cryoci.shim.gpu import select
    from cryoci.uses import foreign, incremental, moving, warm_unpacked

    need_root()
    criu = criu_options.take(rest)
    select.parse_map(rest["device_map"])
    registry = {key: rest.pop(key) for key in ("plain_http", "tls_verify", "ca_file", "authfile")}
    options = RestoreOptions(
        name=rest["name"],
        hostname=rest["hostname"],
        detach=detach,
        engine=rest["engine"],
        runtime=rest["runtime"],
        root=rest["runtime_root"],
        bundle=rest["bundle"],
        allow=rest["allow"],
        criu=criu,
        device_map=rest["device_map"],
        hooks=app_options.take(rest),
        settled=settle if detach else lambda: None,
    )
    identities = sealing.identities(rest, node=True)
    source = reference.parse(ref)
    pulled = None
    gate = Gate(source, output.options(**registry))
    with (
        unwinding(),
        scratch("restore.") as place,
        ExitStack() as held,
        told.about(
            f"cryoci restore {ref}", told.take(rest), registry=gate.options, identities=identities
        ) as page,
    ):
        directory = place / "checkpoint"
        if isinstance(source, reference.DirectoryRef):
            gate(None, None)
            archive.validate(source.path)
            directory = source.path.resolve()
            page.ref = source
        else:
            with output.progress(quiet or as_json) as progress, trace.span("fetch") as fetched:
                pulled = held.enter_context(warm_unpacked.taken(source, gate, output.complain))
                pulled = pulled or unpack.pull(
                    source,
                    directory,
                    progress=progress,
                    registry_options=gate.options,
                    gate=gate,
                    identities=identities,
                )
                fetched["bytes"], directory = pulled.raw_size, pulled.directory
            # an archive is not read twice, and an image is what was restored, whatever its tag means by now
            page.ref = reference.DirectoryRef(directory)
            if not isinstance(source, reference.ArchiveRef):
                page.ref = dataclasses.replace(source, digest=pulled.digest)
        output.verdict(gate.verdict)
        adopted = foreign.adopt(directory, options, place, gate.options)
        for note in () if quiet else adopted.notes:
            click.echo(output.printable(f"cryoci: {note}"), err=True)
        # without --detach the terminal is the container's as soon as it runs
        with output.progress(quiet or as_json or not detach) as progress, moving.shown(progress):
            done = restore(adopted.directory, adopted.options)
        page.seconds, page.warnings = done.seconds, done.warnings
        page.made = [("restored as", done.name), ("id", done.id), ("under", done.engine)]
    if done.status is not None:
        sys.exit(done.status)
    if not isinstance(source, reference.ArchiveRef):
        incremental.restored(done, rest["runtime_root"], ref, pulled.digest if pulled else "")
    output.warn(done.warnings)
    if as_json:
        output.emit_json({"container": done, "image": pulled})
    elif quiet:
        click.echo(done.id)
    else:
        if pulled is not None:
            sizes = f"{output.size(pulled.size)} fetched, {output.size(pulled.raw_size)} of files"
            sizes = f"{output.size(pulled.raw_size)} were unpacked here" if pulled.kept else sizes
            click.echo(f"verified {pulled.digest}: {sizes} in {output.seconds(pulled.seconds)}")
        steps = ", ".join(f"{name} {output.seconds(t)}" for name, t in done.seconds.items())
        click.echo(f"restored {done.name} under {done.engine}: {steps}")
        click.echo(done.id)
