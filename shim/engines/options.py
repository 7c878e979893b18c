# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint and a restore are asked to do, and what a restore made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryoci.errors import ImageError
from cryoci.files import read_json
from cryoci.shim import app
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.memory.supply import Storing, Supplier

RootfsChoice = Literal["auto", "full", "diff", "none"]
_DUMP_ONLY = frozenset({"link-remap", "ghost-limit", "timeout", "skip-in-flight"})


@dataclass(frozen=True)
class DumpOptions:
    """What to take along. `rootfs`: auto is "diff" where the base image is known, else "full".

    `durable`: the directory is the product, so it is on disk before the container ends. `parent` is a checkpoint
    directory with whose chunk files memory is shared. `memory` are KEY=VALUE over [memory] of config.toml. `sink`
    stores memory while it is captured; `supplier` leads to what it or an earlier one has stored.
    """

    leave_running: bool = False
    rootfs: RootfsChoice = "auto"
    volumes: bool = False
    durable: bool = False
    criu: CriuOptions = field(default_factory=CriuOptions)
    hooks: app.Choice = field(default_factory=app.Choice)
    parent: Path | None = None
    memory: tuple[str, ...] = ()
    sink: Storing | None = None
    supplier: Supplier | None = None


@dataclass(frozen=True)
class RestoreOptions:
    """How to restore. `name` None keeps the old name; `bundle` is for bare containers, and made when None.

    `engine` and `runtime` None keep the checkpoint's: `runtime` is podman's name for a runtime, or for bare
    containers a low-level runtime's name or path, and `root` its --root. `allow` names what the checkpoint
    may take from this node (untrusted.ALLOWABLE). `device_map` is "auto" or "OLD=NEW,..." (gpu.select).
    `hostname` is what it is called inside; None: as before. `base` fills an empty root directory with the base
    image of a bare container whose checkpoint holds changes only. `settled` is called when the container is restored
    and nothing is taken back any more.
    """

    name: str | None = None
    hostname: str | None = None
    detach: bool = True
    engine: str | None = None
    runtime: str | None = None
    root: str | None = None
    bundle: Path | None = None
    allow: tuple[str, ...] = ()
    criu: CriuOptions = field(default_factory=CriuOptions)
    device_map: str = "auto"
    hooks: app.Choice = field(default_factory=app.Choice)
    base: Callable[[Path], None] | None = None
    settled: Callable[[], None] = lambda: None


@dataclass
class Restored:
    """A restored container; `status` is its exit status when it was restored in the foreground.

    `pid` is its first process, 0 when it has ended. `warnings` say which app hooks failed, where their policy is to go
    on.
    """

    engine: str
    id: str
    name: str
    status: int | None = None
    pid: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_dump(directory: Path, name: str) -> Any:
    """The JSON file `name` of the checkpoint in `directory`. Raises ImageError when it is missing or no JSON."""
    try:
        return read_json(directory / name)
    except FileNotFoundError as e:
        raise ImageError(f"the checkpoint has no {name}, which its engine needs") from e
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{name} of the checkpoint is not JSON: {e}") from e


def criu_flags(criu: CriuOptions, verb: Literal["dump", "restore"]) -> list[str]:
    """`criu` as flags of cryoci-runtime, which hands each to the runtime or to CRIU's configuration."""
    words: list[str] = []
    for key, value in criu.to_mapping().items():
        if verb == "restore" and key in _DUMP_ONLY:
            continue
        flag = "--manage-cgroups-mode" if key == "manage-cgroups" else f"--{key}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                words.append(flag if one else f"{flag}=false")
            else:
                words += [flag, str(one)]
    return words
