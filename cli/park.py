# SPDX-License-Identifier: Apache-2.0
"""cryoci park: free a container's GPUs: its GPU memory goes to host memory, and it is frozen."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import app_options, output, told


@click.command(
    "park", short_help="Free a container's GPUs: its GPU memory goes to host memory, and it is frozen."
)
@click.argument("container")
@click.option("--runtime-root", metavar="DIR", help="--root of runc or crun, for bare containers.")
@app_options.hooks("pre-checkpoint", "post-restore")
@told.options
@output.json_option
@output.quiet_option
def command(container: str, runtime_root: str | None, as_json: bool, quiet: bool, **rest: Any) -> None:
    """Park CONTAINER: bring what it holds on GPUs into host memory, and freeze it.

    Its GPUs are free for others until `cryoci unpark`. Its processes, connections and files stay as they are. A
    container without CUDA processes is only frozen. Parking a parked container does nothing.

    Annotation io.cryoci.pre-checkpoint of the container, or --pre-checkpoint, is done first, such as a model server's
    /sleep; `cryoci unpark` does io.cryoci.post-restore, or what --post-restore says here.

    \b
    Examples:
      cryoci park llama
      cryoci park llama && cryoci unpark mistral
      cryoci park web --pre-checkpoint 'signal: USR1' --pre-checkpoint 'wait: 2s'
    """
    from cryoci.cli.signals import unwinding
    from cryoci.shim import engines
    from cryoci.shim.engines import gpu
    from cryoci.shim.record import Record
    from cryoci.uses import moving

    hooks = app_options.take(rest)
    with unwinding(), told.about(f"cryoci park {container}", told.take(rest)) as page:
        found = engines.find(container, root=runtime_root)
        with (
            output.progress(quiet or as_json) as progress,
            moving.shown(progress, Record(found.root, found.id).directory),
        ):
            done = gpu.park(found, hooks)
        page.seconds = done.seconds
    output.parked(done, as_json=as_json, quiet=quiet)
