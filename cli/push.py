# SPDX-License-Identifier: Apache-2.0
"""cryoci push: a checkpoint, or an image of one, to a registry or layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cryoci.cli import output, sealing, told

if TYPE_CHECKING:
    from cryoci.ociimage.progress import Progress
    from cryoci.ociimage.reference import ArchiveRef, DirectoryRef


@click.command("push", short_help="Package a checkpoint and write it to a registry or layout.")
@click.argument("source")
@click.argument("target")
@click.option(
    "-a",
    "--annotation",
    "annotations",
    multiple=True,
    metavar="KEY=VALUE",
    help="Add an annotation; repeatable.",
)
@click.option(
    "--compression",
    show_default="zstd:1",
    help="zstd:LEVEL, gzip:LEVEL (for old engines), none, or auto: as strong as the link is slow.",
)
@output.backend_option
@sealing.encrypt_option
@output.registry_options
@told.options
@output.json_option
@output.quiet_option
def command(
    source: str,
    target: str,
    annotations: tuple[str, ...],
    compression: str | None,
    backend: str,
    encrypt_to: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Write the checkpoint SOURCE to TARGET.

    SOURCE is a checkpoint directory (./DIR) or an engine's archive (FILE.tar, also .gz and .zst), which are
    packaged in one pass, without a scratch copy (an archive is first unpacked, under $TMPDIR or
    /var/lib/cryoci/tmp); or an image (NAME, oci:LAYOUT:NAME, HOST/REPO:TAG), which is copied as it is, so that
    digests stay.

    TARGET is HOST/REPO:TAG in a registry, NAME in the local store, or oci:LAYOUT:NAME. It is tagged last and
    read back; after a failure nothing is tagged. containers-storage:NAME, made by buildah, is among the images of
    podman and CRI-O on this node.

    \b
    Examples:
      cryoci push ./checkpoint registry.example.com/team/counter:1
      cryoci push /tmp/podman-export.tar.zst counter:1
      cryoci push --encrypt-to age1... ./checkpoint registry.example.com/team/counter:1
      cryoci push counter:1 registry.example.com/team/counter:1
      cryoci push /tmp/podman-export.tar containers-storage:localhost/counter:1
      cryoci push --compression zstd:3 -a com.example.ticket=42 ./checkpoint oci:/backup:counter
    """
    from cryoci import trace
    from cryoci.errors import UsageError
    from cryoci.ociimage import image, reference

    result: image.PackResult | image.CopyResult
    origin = reference.parse(source)
    page = told.take(where)
    title = f"cryoci push {source} {target}"
    if target.startswith(reference.STORAGE):
        if encrypt_to or compression or isinstance(origin, (reference.LayoutRef, reference.RegistryRef)):
            raise UsageError(
                f"{target} takes a directory or an archive, not encrypted and not compressed",
                hint=f"pull {source} to a directory first",
            )
        with (
            told.about(title, page) as done,
            output.progress(quiet or as_json) as progress,
            _directory(origin, progress) as directory,
        ):
            from cryoci.ociimage import buildah  # whose shell takes as long to import as a small push

            name = target.removeprefix(reference.STORAGE)
            result = buildah.build(directory, name, annotations=_annotations(annotations))
            done.ref, done.seconds = origin, {"push": result.seconds}
        _report(result, as_json=as_json, quiet=quiet)
        return
    goal = reference.parse(target)
    if not isinstance(goal, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(
            f"{target} is no place for an image", hint="push to HOST/REPO:TAG, NAME or oci:LAYOUT:NAME"
        )
    noted = _annotations(annotations)
    recipients = sealing.recipients(encrypt_to)
    options = output.options(**where)
    with (
        told.about(title, page, registry=options) as done,
        output.progress(quiet or as_json) as progress,
        trace.span("push", bytes=0) as moved,
    ):
        if isinstance(origin, (reference.LayoutRef, reference.RegistryRef)):
            if noted:
                raise UsageError(
                    "annotations are fixed once an image exists", hint="push the directory with them"
                )
            for option, given in (
                ("--encrypt-to", recipients),
                ("--compression", compression),
                ("--backend", backend != "cryoci"),
            ):
                if given:
                    raise UsageError(
                        f"an image that exists is copied as it is: {option} is for directories and archives",
                        hint=f"pull it to a directory and push that with {option}",
                    )
            result = image.copy(origin, goal, progress=progress, registry_options=options)
        else:
            with _directory(origin, progress) as directory:
                result = image.push(
                    directory,
                    goal,
                    annotations=noted,
                    compression=compression or "zstd:1",
                    progress=progress,
                    registry_options=options,
                    encrypt_to=recipients,
                    backend=backend,
                )
        moved["bytes"] = result.size
        done.ref, done.seconds = goal, {"push": result.seconds}
        done.made = [("image", result.reference), ("digest", result.digest)]
    _report(result, as_json=as_json, quiet=quiet)


def _annotations(words: tuple[str, ...]) -> dict[str, str]:
    from cryoci.errors import UsageError

    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"bad annotation {word!r}", hint="write --annotation KEY=VALUE")
        found[key] = value
    return found


@contextmanager
def _directory(origin: DirectoryRef | ArchiveRef, progress: Progress | None) -> Iterator[Path]:
    """The checkpoint directory; that of an archive lies in a scratch directory for as long as the block runs."""
    from cryoci.files import scratch
    from cryoci.ociimage import image, reference

    if isinstance(origin, reference.DirectoryRef):
        yield origin.path
        return
    with scratch("push.") as place:
        yield image.pull(origin, place / "checkpoint", progress=progress).directory


def _report(result: Any, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        output.emit_json(result)
    elif quiet:
        click.echo(result.digest)
    else:
        raw = getattr(result, "raw_size", None)
        made = (
            f"{output.size(raw)} as {output.size(result.size)}"
            if raw is not None
            else output.size(result.size)
        )
        there = f", {output.size(result.skipped)} were there" if result.skipped else ""
        click.echo(f"pushed {result.reference}: {made} in {output.seconds(result.seconds)}{there}")
        click.echo(f"digest {result.digest}")
