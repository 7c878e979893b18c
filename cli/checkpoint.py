# SPDX-License-Identifier: Apache-2.0
"""cryoci checkpoint: a running container into a directory, layout or registry."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import app_options, criu_options, output, sealing, told


@click.command("checkpoint", short_help="Checkpoint a running container.")
@click.argument("container")
@click.option(
    "-o",
    "--output",
    "target",
    metavar="REF",
    help="Where to: ./DIR, NAME[:TAG] in the local store, oci:LAYOUT:TAG or HOST/REPO:TAG. "
    "Default: the container's name in the local store.",
)
@click.option("-R", "--leave-running", is_flag=True, help="Let the container run on afterwards.")
@click.option(
    "--rootfs",
    type=click.Choice(["auto", "full", "diff", "none"]),
    default="auto",
    show_default=True,
    help="How much of the file system travels: what the container changed (diff), or all of it (full). "
    "auto: diff where the engine knows the base image, else full.",
)
@click.option("--volumes", is_flag=True, help="Take the content of named volumes along.")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@click.option(
    "--compression", default="zstd:1", show_default=True, help="zstd:LEVEL, gzip:LEVEL, none or auto."
)
@click.option(
    "--incremental",
    is_flag=True,
    help="Write and send only memory that changed since an earlier checkpoint.",
)
@click.option(
    "--parent",
    metavar="REF",
    help="The earlier checkpoint, for --incremental. Default: the newest of this container.",
)
@click.option(
    "--thin",
    is_flag=True,
    help="For --incremental and a directory: leave what the parent has there, and name it (`cryoci flatten`).",
)
@click.option(
    "--memory-option",
    "memory",
    multiple=True,
    metavar="KEY=VALUE",
    help="How memory moves, over [memory] of config.toml: engine=parallel, write=direct, threads=4...; repeatable.",
)
@click.option(
    "--straight",
    is_flag=True,
    help="Store memory in the registry or layout while it is captured, with no copy on this node's disk.",
)
@app_options.hooks("pre-checkpoint", "post-restore")
@output.backend_option
@sealing.encrypt_option
@criu_options.for_dump
@output.registry_options
@told.options
@output.json_option
@output.quiet_option
def command(
    container: str,
    target: str | None,
    leave_running: bool,
    rootfs: Any,
    volumes: bool,
    runtime_root: str | None,
    compression: str,
    backend: str,
    encrypt_to: tuple[str, ...],
    incremental: bool,
    parent: str | None,
    thin: bool,
    memory: tuple[str, ...],
    straight: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Checkpoint CONTAINER: its processes, memory and file system.

    CONTAINER is the name or id of a podman container, or the id of a bare runc or crun container. It is
    frozen while it is dumped and stored, and ends only when its checkpoint has been read back; whatever fails
    before leaves it running. With --leave-running it runs on as soon as it is dumped.

    Annotations io.cryoci.pre-checkpoint and io.cryoci.post-restore of the container, or the flags of these
    names, are steps for the application: the first are done before the freeze, the others when it runs on, here
    (--leave-running, or a failure) or after a restore.

    With --incremental, memory that did not change is linked to the files of an earlier checkpoint of the container,
    and the image names its layers: whole all the same, whatever happens to the earlier one. It needs [memory]
    engine = "parallel" (docs/memory.md).

    With --straight, large memory needs no room on this node's disk: each chunk is stored as a layer before it is
    dropped, and comes back from there if the container is to run on. `--memory-option budget=256M` bounds the memory
    that this takes meanwhile.

    \b
    Examples:
      cryoci checkpoint web
      cryoci checkpoint web -R --incremental -o registry.example:5000/checkpoints/web:2
      cryoci checkpoint trainer --straight -o registry.example:5000/checkpoints/trainer:1
      cryoci checkpoint web -R -o registry.example:5000/checkpoints/web:1
      cryoci checkpoint db --tcp-established --file-locks --volumes -o ./db-checkpoint
    """
    from contextlib import ExitStack
    from dataclasses import replace

    from cryoci import trace
    from cryoci.cli.signals import unwinding
    from cryoci.errors import UsageError
    from cryoci.files import scratch
    from cryoci.ociimage import image, reference
    from cryoci.shim import engines
    from cryoci.shim.engines.options import DumpOptions
    from cryoci.shim.memory.settings import Settings
    from cryoci.shim.record import Record
    from cryoci.uses import moving
    from cryoci.uses.dumping import dumping
    from cryoci.uses.incremental import Lineage, begin
    from cryoci.uses.straight import straight as storing
    from cryoci.uses.straight import supplier

    criu = criu_options.take(rest)
    page_at = told.take(rest)
    hooks = app_options.take(rest)
    ref = reference.parse(target) if target else None
    if isinstance(ref, reference.ArchiveRef):
        raise UsageError(
            "cryoci writes directories and images, not archives",
            hint="use podman's own `podman container checkpoint --export` with cryoci-runtime for an archive",
        )
    recipients = sealing.recipients(encrypt_to)
    if recipients and backend == "buildah":
        raise UsageError("buildah does not encrypt as cryoci does", hint="leave out --backend buildah")
    if recipients and isinstance(ref, reference.DirectoryRef):
        raise UsageError("--encrypt-to is for images, not directories", hint="give -o NAME or HOST/REPO:TAG")
    to_directory = isinstance(ref, reference.DirectoryRef)
    if (parent or thin) and not incremental:
        raise UsageError("--parent and --thin are for --incremental", hint="add --incremental")
    if thin and not to_directory:
        raise UsageError("--thin is for directories: an image is always whole", hint="leave it out")
    if incremental and backend == "buildah":
        raise UsageError("buildah writes all layers anew", hint="leave out --backend buildah")
    if straight and (to_directory or incremental or recipients or backend == "buildah"):
        raise UsageError(
            "--straight is for images, and not together with --incremental, --encrypt-to or --backend buildah",
            hint="leave out --straight",
        )
    if straight:
        memory = (*memory, "engine=parallel")
    for one in memory:
        Settings().changed(one)  # what is wrong is said before anything is touched
    found = engines.find(container, root=runtime_root)
    registry = output.options(**rest)
    goal = ref or reference.parse(found.name)
    with (
        told.about(f"cryoci checkpoint {container}", page_at, registry=registry) as page,
        unwinding(),
        output.progress(quiet or as_json) as progress,
        moving.shown(progress, Record(found.root, found.id).directory),
    ):
        lineage = Lineage(found)
        if incremental:
            lineage = begin(
                found, goal, parent, sealed=bool(recipients), thin=thin, registry_options=registry
            )
        options = DumpOptions(
            leave_running,
            rootfs,
            volumes,
            to_directory,
            criu,
            hooks,
            lineage.local,
            memory,
            supplier=supplier(registry),
        )
        if isinstance(goal, reference.DirectoryRef):
            with dumping(found, goal.path, options, output.part(progress)) as done:
                pass
            files = lineage.finish(goal.path, thin=thin)
            done.warnings += lineage.notes
            page.ref, page.seconds, page.warnings = goal, done.seconds, done.warnings
            _report(
                done, None, str(goal), as_json=as_json, quiet=quiet, files=files if incremental else None
            )
            return
        assert isinstance(goal, (reference.LayoutRef, reference.RegistryRef))
        with ExitStack() as stack:
            sink = None
            if straight:
                sink = stack.enter_context(storing(found, goal, compression, registry, memory))
                options = replace(options, sink=sink, supplier=sink.supplier)
            place = stack.enter_context(scratch("checkpoint."))
            done = stack.enter_context(dumping(found, place / "checkpoint", options, output.part(progress)))
            with trace.span("store", chosen=f"compression {compression}") as stored:
                result = image.push(
                    done.directory,
                    goal,
                    compression=compression,
                    progress=progress,
                    registry_options=registry,
                    encrypt_to=recipients,
                    backend=backend,
                    parent=lineage.image,
                    here=sink.layers if sink else (),
                )
                stored["bytes"] = result.raw_size
            if leave_running:
                lineage.stored(done.directory, goal, result.digest)
        done.warnings += lineage.notes + (sink.notes if sink else [])
        page.ref, page.seconds, page.warnings = goal, done.seconds, done.warnings
    _report(done, result, result.reference, as_json=as_json, quiet=quiet)


def _report(
    done: Any, result: Any, reference: str, *, as_json: bool, quiet: bool, files: Any = None
) -> None:
    output.warn(done.warnings)
    if as_json:
        output.emit_json(
            {
                "container": done.container.id,
                "seconds": done.seconds,
                "image": result or reference,
                **({"files": files} if files else {}),
                "warnings": done.warnings,
            }
        )
    elif quiet:
        click.echo(result.digest if result else reference)
    else:
        steps = ", ".join(f"{name} {output.seconds(t)}" for name, t in done.seconds.items())
        click.echo(f"checkpointed {done.container.name}: {steps}")
        if result is None:
            sizes = f": {output.size(files.new)} new, {output.size(files.shared)} shared" if files else ""
            click.echo(f"checkpoint directory {reference}{sizes}")
        else:
            sizes = f"{output.size(result.raw_size)} as {output.size(result.size)}"
            if result.shared:
                new = output.size(result.size - result.shared)
                sizes = f"{output.size(result.raw_size)} as {new} new, {output.size(result.shared)} shared"
            click.echo(f"stored {reference}: {sizes} in {output.seconds(result.seconds)}")
            click.echo(f"digest {result.digest}")
