# SPDX-License-Identifier: Apache-2.0
"""`cryoci bake`: start a container, wait until it is ready, checkpoint it: an image that starts where others are."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryoci.errors import UsageError
from cryoci.files import scratch
from cryoci.ociimage import image
from cryoci.ociimage.progress import Work, silent
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.engines.options import DumpOptions
from cryoci.uses import ready
from cryoci.uses.bake_start import Start
from cryoci.uses.dumping import dumping

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Recipients


@dataclass(frozen=True)
class Recipe:
    """What to start, and when it is ready; `timeout` in seconds, until it is."""

    start: Start
    checks: tuple[ready.Check, ...]
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
    say: Callable[[str], None] = lambda line: None,
    work: Work = silent,
    registry_options: RegistryOptions | None = None,
    encrypt_to: Recipients | None = None,
) -> Baked:
    """Make the image `goal`. The container is removed, whatever happens. Raises what the steps raise.

    `say` hears what is waited for, `work` tells of the dump and of the image.
    """
    if not recipe.checks:
        raise UsageError(
            "nobody can tell when the container is ready",
            hint="give --ready-http URL, --ready-port PORT, --ready-log REGEX or --ready-command COMMAND",
        )
    start, began = recipe.start, time.monotonic()
    with ExitStack() as undo, scratch("bake.") as place:
        undo.callback(start.remove)
        start.start()
        ready.wait(start, recipe.checks, recipe.timeout, say)
        seconds = {"start": time.monotonic() - began}
        container = start.container()
        with dumping(container, place / "checkpoint", recipe.dump, work) as done:
            with work(f"store {goal}") as progress:
                made = image.push(
                    done.directory,
                    goal,
                    compression=compression,
                    progress=progress,
                    registry_options=registry_options,
                    encrypt_to=encrypt_to,
                )
    return Baked(made, {**seconds, **done.seconds, "store": made.seconds}, done.warnings)
