# SPDX-License-Identifier: Apache-2.0
"""`cryoci bake`: start a container, wait until it is ready, checkpoint it: an image that starts where others are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from cryoci.command import run, which
from cryoci.errors import NotFoundError, UsageError
from cryoci.files import scratch
from cryoci.ociimage import image
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.engines import podman
from cryoci.shim.engines.checkpoint import checkpoint
from cryoci.shim.engines.options import DumpOptions
from cryoci.uses import ready


@dataclass(frozen=True)
class Recipe:
    """What to run: `podman run PODMAN --name=NAME IMAGE COMMAND`; `timeout` in seconds, until it is ready."""

    image: str
    command: tuple[str, ...]
    name: str
    checks: tuple[ready.Check, ...]
    podman: tuple[str, ...] = ()
    timeout: float = 600.0
    dump: DumpOptions = field(default_factory=DumpOptions)


@dataclass
class Baked:
    """The image; `seconds` of each step: "start" is what a restore will save."""

    image: image.PackResult
    seconds: dict[str, float]
    warnings: list[str]


def bake(
    recipe: Recipe,
    goal: LayoutRef | RegistryRef,
    *,
    compression: str = "zstd:1",
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
) -> Baked:
    """Make the image `goal`. The container is removed, whatever happens. Raises what the steps raise."""
    if not recipe.checks:
        raise UsageError(
            "nobody can tell when the container is ready",
            hint="give --ready-http URL, --ready-port PORT, --ready-log REGEX or --ready-command COMMAND",
        )
    which("podman")
    began = time.monotonic()
    with ExitStack() as undo, scratch("bake.") as place:
        undo.callback(_remove, recipe.name, _exists(recipe.name))
        run(_argv(recipe), hint="it is podman that refused: the same command by hand says more")
        ready.wait(recipe.name, recipe.checks, recipe.timeout)
        seconds = {"start": time.monotonic() - began}
        container = podman.find(recipe.name)
        if container is None:
            raise NotFoundError(f"container {recipe.name} was removed while it was baked")
        with checkpoint(container, place / "checkpoint", recipe.dump) as done:
            made = image.push(
                done.directory,
                goal,
                compression=compression,
                progress=progress,
                registry_options=registry_options,
            )
    return Baked(made, {**seconds, **done.seconds, "store": made.seconds}, done.warnings)


def _argv(recipe: Recipe) -> Sequence[str]:
    return [
        *("podman", "run", "--detach", "--quiet", f"--name={recipe.name}"),
        *recipe.podman,
        recipe.image,
        *recipe.command,
    ]


def _exists(name: str) -> bool:
    return run(["podman", "container", "exists", "--", name], check=False).returncode == 0


def _remove(name: str, was_there: bool) -> None:
    """Remove the container, unless somebody had one of that name before (podman then refuses ours)."""
    if not was_there:
        run(["podman", "rm", "--force", "--time=0", "--volumes", "--", name], check=False)
