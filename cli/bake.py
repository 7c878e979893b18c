# SPDX-License-Identifier: Apache-2.0
"""cryoci bake: an image of a container that is ready."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import click

from cryoci.cli import app_options, criu_options, output, sealing, told


@click.command(
    "bake",
    short_help="Start a container, wait until it is ready, and make a checkpoint image of it.",
    context_settings={"allow_interspersed_args": False},
)
@click.argument("image", required=False)
@click.argument("words", nargs=-1, metavar="[COMMAND]...", type=click.UNPROCESSED)
@click.option(
    "-o", "--output", "target", metavar="REF", required=True, help="NAME, oci:LAYOUT:TAG or HOST/REPO:TAG."
)
@click.option(
    "--ready-http", multiple=True, metavar="URL", help="Ready when http://127.0.0.1:PORT/PATH answers 2xx."
)
@click.option(
    "--ready-port", multiple=True, metavar="PORT", help="Ready when the TCP port takes connections."
)
@click.option("--ready-log", multiple=True, metavar="REGEX", help="Ready when its log has a line like that.")
@click.option(
    "--ready-command", multiple=True, metavar="COMMAND", help="Ready when this ends well in the container."
)
@click.option(
    "--ready-timeout", default="10m", show_default=True, metavar="TIME", help="Time until it must be ready."
)
@click.option("--name", help="Name of the container, which a restore takes over. Default: bake-RANDOM.")
@click.option(
    "-p",
    "--podman",
    multiple=True,
    metavar="OPTION",
    help="Option of podman run, such as --podman=--env=A=B; repeatable.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="Instead of IMAGE: start this OCI bundle by runc or crun, without podman.",
)
@click.option(
    "--rootfs",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="none: leave the bundle's files out; a restore gets a bundle with the same.",
)
@click.option("--volumes", is_flag=True, help="Take the content of named volumes along.")
@click.option("--compression", default="zstd:1", show_default=True, help="zstd:LEVEL, gzip:LEVEL or none.")
@sealing.encrypt_option
@app_options.hooks("pre-checkpoint")
@criu_options.for_dump
@output.registry_options
@told.options
@output.json_option
@output.quiet_option
def command(
    image: str | None, words: tuple[str, ...], target: str, as_json: bool, quiet: bool, **rest: Any
) -> None:
    """Run IMAGE under podman (or a bundle), wait until it is ready, checkpoint it to REF, and remove it.

    All conditions must hold, in the order http, port, log, command. App hooks are done before the checkpoint. A
    restore of REF then starts where the container was ready.

    \b
    Examples:
      cryoci bake --ready-http http://127.0.0.1:8000/health -o registry.example:5000/warm/llm:1 vllm/vllm-openai
      cryoci bake --ready-log 'ready to accept' --podman=--env=POSTGRES_PASSWORD=x -o db:1 postgres
      cryoci bake --ready-port 8000 -o llm:1 --rootfs none --bundle /srv/llm
    """
    from cryoci import durations
    from cryoci.cli.signals import unwinding
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference
    from cryoci.shim.engines.options import DumpOptions
    from cryoci.uses import bake, bake_start, ready

    goal = reference.parse(target)
    if not isinstance(goal, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(
            f"{target} is no place for an image", hint="give HOST/REPO:TAG, NAME or oci:LAYOUT:NAME"
        )
    kinds: tuple[Any, ...] = ("http", "port", "log", "command")
    checks = tuple(ready.Check(kind, value) for kind in kinds for value in rest.pop(f"ready_{kind}"))
    compression, recipients = rest.pop("compression"), sealing.recipients(rest.pop("encrypt_to"))
    bundle, podman, rootfs = rest.pop("bundle"), rest.pop("podman"), rest.pop("rootfs")
    name = rest.pop("name") or f"bake-{secrets.token_hex(4)}"
    if (bundle is None) == (image is None) or (bundle is not None and podman):
        raise UsageError("nobody can tell what to start", hint="give IMAGE [COMMAND], or --bundle DIR alone")
    if bundle is None and rootfs == "none":
        raise UsageError(
            "--rootfs none is for bundles: podman's changed files go with it", hint="leave it out"
        )
    recipe = bake.Recipe(
        start=bake_start.Podman(name, podman, image or "", words)
        if bundle is None
        else bake_start.Bundle(name, bundle),
        checks=checks,
        timeout=durations.parse(rest.pop("ready_timeout")),
        dump=DumpOptions(
            rootfs=rootfs,
            volumes=rest.pop("volumes"),
            criu=criu_options.take(rest),
            hooks=app_options.take(rest),
        ),
    )
    say = (lambda line: None) if quiet or as_json else output.note
    terminal = None if quiet or as_json else output.terminal()
    with unwinding(), told.about(f"cryoci bake {target}", told.take(rest)) as page:
        made = bake.bake(
            recipe,
            goal,
            compression=compression,
            registry_options=output.options(**rest),
            encrypt_to=recipients,
            say=say,
            work=output.work(say, terminal),
        )
        page.ref, page.seconds, page.warnings = goal, made.seconds, made.warnings
    output.warn(made.warnings)
    if as_json:
        output.emit_json(made)
    elif quiet:
        click.echo(made.image.digest)
    else:
        steps = ", ".join(f"{name} {output.seconds(t)}" for name, t in made.seconds.items())
        click.echo(f"baked {made.image.reference}: {output.size(made.image.size)}: {steps}")
        click.echo(f"digest {made.image.digest}")
