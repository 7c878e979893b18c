# SPDX-License-Identifier: Apache-2.0
"""cryoci guard: checkpoints at intervals, and the newest good one back after a crash."""

from __future__ import annotations

import time
from typing import Any

import click

from cryoci.cli import app_options, criu_options, groups, output, sealing


@click.group(
    "guard",
    cls=groups.RunByDefault,
    short_help="Checkpoint a container at intervals, and restore it after a crash.",
)
def command() -> None:
    """Guard a container: checkpoints at intervals, the newest good one back after a crash.

    `cryoci guard CONTAINER` is short for `cryoci guard run CONTAINER`, whose --help has its options.

    \b
    Examples:
      cryoci guard trainer --every 10m
      cryoci guard trainer --every 30s --to tmpfs --keep 3
      cryoci guard trainer --every 1m --incremental
      cryoci guard trainer --every 1h --to registry.example:5000/guarded
      cryoci guard trainer --every 1h --to registry.example:5000/guarded --encrypt-to age1...
      cryoci guard status
    """


@command.command("run")
@click.argument("container")
@click.option("--every", default="10m", show_default=True, metavar="TIME", help="Time between checkpoints.")
@click.option(
    "--to",
    default="disk",
    show_default=True,
    metavar="PLACE",
    help="tmpfs (memory: fast, gone after a reboot), disk (/var/lib/cryoci/guard), or HOST/REPO of a registry.",
)
@click.option("--keep", default=2, show_default=True, type=click.IntRange(1), help="Checkpoints to keep.")
@click.option(
    "--on-failure",
    type=click.Choice(["restore", "none"]),
    default="restore",
    show_default=True,
    help="What to do when the container crashes.",
)
@click.option(
    "--stable",
    default="60s",
    show_default=True,
    metavar="TIME",
    help="A container that crashes sooner after its restore makes that checkpoint suspect: an older one is next.",
)
@click.option(
    "--rootfs",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="none: leave the files of a bare container where they are, in its bundle, also at a restore.",
)
@click.option(
    "--incremental",
    is_flag=True,
    help="Write and send only memory that changed since the checkpoint before.",
)
@click.option("--volumes", is_flag=True, help="Take the content of named volumes along.")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@sealing.encrypt_option
@sealing.decrypt_options
@output.metrics_option
@app_options.hooks("pre-checkpoint", "post-restore")
@criu_options.for_dump
@output.registry_options
def run(container: str, every: str, to: str, keep: int, on_failure: str, stable: str, **rest: Any) -> None:
    """Guard CONTAINER until it finishes, or is stopped, removed or moved by somebody.

    Ctrl-C or SIGTERM ends the guard and leaves the container running; the same command goes on later, also after
    the guard was killed. A container of podman that crashed is kept as NAME-crashed.

    With --encrypt-to, which is for a registry, this node must be able to open what it may have to restore: by a key in
    /etc/cryoci/decrypt/, or --decrypt-key.
    """
    from cryoci import durations
    from cryoci.cli.signals import unwinding
    from cryoci.shim.engines.options import DumpOptions
    from cryoci.uses import guard, guard_places, metrics, stdio

    address = rest.pop("metrics")
    criu = criu_options.take(rest)
    hooks = app_options.take(rest)
    root = rest.pop("runtime_root")
    sharing = rest.pop("incremental")
    sealed = guard_places.Sealing(
        sealing.recipients(rest.pop("encrypt_to")), sealing.identities(rest, node="/" in to)
    )
    options = guard.Options(
        every=durations.parse(every),
        to=to,
        keep=keep,
        restores=on_failure == "restore",
        stable=durations.parse(stable),
        root=root,
        dump=DumpOptions(
            leave_running=True,
            rootfs=rest.pop("rootfs"),
            volumes=rest.pop("volumes"),
            criu=criu,
            hooks=hooks,
        ),
        hooks=hooks,
        registry=output.options(**rest),
        incremental=sharing,
        sealing=sealed,
    )
    terminal = output.terminal()  # of now: stdio is another in the block
    with unwinding(), stdio.own() as say:
        made = guard.Guard(container, options, say, output.work(say, terminal))
        with metrics.serving(address, made.metrics):
            made.run()


@command.command("status")
@click.argument("container", required=False)
@output.json_option
def status(container: str | None, as_json: bool) -> None:
    """Show all guards, or that of CONTAINER."""
    from cryoci.errors import NotFoundError
    from cryoci.uses import guard_state

    found = [state for state in guard_state.every_state() if container in (None, state.name)]
    if container and not found:
        raise NotFoundError(f"container {container} was never guarded", hint=f"cryoci guard {container}")
    if as_json:
        output.emit_json([{"alive": state.alive, "state": state} for state in found])
        return
    output.table(
        (
            "CONTAINER",
            "GUARD",
            "EVERY",
            "KEPT IN",
            "KEPT",
            "NEWEST",
            "PAUSE",
            "SIZE",
            "CRASHES",
            "WORK LOST",
            "NOTE",
        ),
        [_row(state, time.time()) for state in found],
    )


def _row(state: Any, now: float) -> tuple[str, ...]:
    newest = max(state.kept, key=lambda kept: kept.number, default=None)
    return (
        state.name,
        state.phase if state.alive or state.phase not in ("watching", "restoring") else "not running",
        output.seconds(state.every),
        state.to,
        str(len(state.kept)),
        f"{output.seconds(now - newest.taken)} ago" if newest else "",
        output.seconds(newest.pause) if newest else "",
        output.size(newest.size) if newest else "",
        str(len(state.recoveries)),
        output.seconds(state.lost) if state.recoveries else "",
        state.message,
    )


@command.command("stop")
@click.argument("container")
@click.option("--remove", is_flag=True, help="Remove its checkpoints as well.")
@output.registry_options
def stop(container: str, remove: bool, **where: Any) -> None:
    """End the guard of CONTAINER, which runs on. The options for a registry are for --remove."""
    from cryoci.uses import guard

    if not guard.stop(container, remove=remove, registry=output.options(**where)):
        click.echo(f"no guard of {container} ran" + ("; its checkpoints are removed" if remove else ""))
