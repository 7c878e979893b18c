# SPDX-License-Identifier: Apache-2.0
"""A container as its engine knows it, and the few acts that differ from engine to engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoci.command import describe
from cryoci.errors import ConflictError, NotFoundError, ToolError
from cryoci.shim import waiting
from cryoci.shim.engines.adopted import adopted
from cryoci.shim.engines.interrupt import whole
from cryoci.shim.record import Record

LAUNCHER = Path(__file__).resolve().parent.parent / "launcher.py"


@dataclass(frozen=True)
class Overlay:
    """The overlay mount of a container's rootfs: the rw layer, and the read-only ones from top to bottom."""

    upper: Path
    lowers: tuple[Path, ...]


@dataclass(frozen=True)
class Volume:
    """A named volume of the engine: `source` on this node, mounted at `destination` in the container."""

    name: str
    source: Path
    destination: str


@dataclass(frozen=True)
class Container:
    """One container on this node.

    `engine` is "podman", "runc" or "crun" (bare); `runtime` the absolute path of the low-level runtime that
    made it and `root` its --root (None: the default). `rootfs` is the merged file system as this node sees
    it. `dumps` holds what the engine writes into an archive beside CRIU's images: file name -> JSON value.
    `pid` was its first process when it was looked for, 0 if there was none.
    """

    engine: str
    id: str
    name: str
    runtime: str
    root: str | None
    bundle: Path
    rootfs: Path
    overlay: Overlay | None
    spec: dict[str, Any]
    facts: dict[str, str] = field(default_factory=dict)
    dumps: dict[str, Any] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    shm: Path | None = None
    log: Path | None = None
    auto_remove: bool = False
    pid: int = 0

    def call(
        self, verb: str, *options: str, after: tuple[str, ...] = (), check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """Run cryoci-runtime VERB OPTIONS ID AFTER on this container. Raises ToolError with what it said."""
        if verb == "state":
            argv = state_argv(self.root, self.id, self.runtime)
        else:
            argv = runtime_argv(self.root, verb, *options, self.id, *after)
        with nullcontext() if argv[0] == self.runtime else self.known():
            result = whole(argv)
        if check and result.returncode != 0:
            raise ToolError(describe(argv, result))
        return result

    def known(self) -> AbstractContextManager[None]:
        """cryoci-runtime knows which runtime made the container, within a with block. Raises OSError."""
        return adopted(self.root, self.id, self.runtime, os.fspath(self.bundle))

    def state(self) -> dict[str, Any]:
        """The runtime's state of the container (runtime-spec, "State"). Raises NotFoundError."""
        result = self.call("state", check=False)
        if result.returncode != 0:
            said = result.stderr.decode(errors="replace").strip()
            raise NotFoundError(f"{self.runtime} knows no container {self.id}: {said}")
        value = json.loads(result.stdout)
        return value if isinstance(value, dict) else {}

    @property
    def status(self) -> str:
        """running, paused, stopped or created."""
        return str(self.state().get("status", "unknown"))

    def must_run(self) -> dict[str, Any]:
        """Its state; raises ConflictError unless the container can be checkpointed."""
        state = self.state()
        status = str(state.get("status", "unknown"))
        if status not in ("running", "paused"):
            raise ConflictError(
                f"container {self.name} is {status}; only a running container can be checkpointed",
                hint="start it first" if status in ("created", "stopped") else None,
            )
        return state


def runtime_argv(root: str | None, verb: str, *words: str) -> list[str]:
    """Command line of cryoci-runtime: every act on a container goes through it, like the engines' own."""
    argv = [sys.executable, "-IS", os.fspath(LAUNCHER)]
    if root is not None:
        argv += ["--root", root]
    return [*argv, verb, *words]


def state_argv(root: str | None, container_id: str, runtime: str) -> list[str]:
    """Command line that asks for the state of a container which `runtime` made.

    That runtime answers where cryoci-runtime would only pass the question on, at the price of a start of Python.
    """
    waits = f"{Record(root, container_id).directory}/{waiting.NAME}"
    if not os.access(runtime, os.X_OK) or os.path.exists(waits):
        return [*runtime_argv(root, "state"), container_id]
    return [runtime, *(["--root", root] if root is not None else []), "state", container_id]


def overlay_at(path: Path, mountinfo: Sequence[str] | None = None) -> Overlay | None:
    """The overlay mounted at `path` in this mount namespace, or None (proc_pid_mountinfo(5)).

    None also when its layers are named relative to the directory of whoever mounted it, as containerd does.
    """
    if mountinfo is None:
        mountinfo = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")
    wanted = os.path.realpath(path)
    found: Overlay | None = None
    for line in mountinfo:
        fields = line.split(" ")
        try:
            where, dash = fields[4], fields.index("-", 6)
            kind, options = fields[dash + 1], fields[dash + 3]
        except (ValueError, IndexError):
            continue
        if _unescape(where) == wanted:  # a later mount at the same place hides the earlier one
            found = _overlay(options) if kind == "overlay" else None
    return found


def _overlay(options: str) -> Overlay | None:
    """Layers in the mount options; since Linux 6.8 each lower one may have an option of its own."""
    upper, lowers = "", []
    for option in options.split(","):
        key, _, value = option.partition("=")
        if key == "upperdir":
            upper = _layer(value)
        elif key == "lowerdir":
            lowers += [_layer(part) for part in re.split(r"(?<!\\134):", value) if part]
        elif key == "lowerdir+":
            lowers.append(_layer(value))
    if not lowers or not all(path.startswith("/") for path in (upper, *lowers)):
        return None
    return Overlay(Path(upper), tuple(map(Path, lowers)))


def _layer(text: str) -> str:
    """A layer's path: mountinfo escapes what overlayfs has escaped itself (overlayfs.rst)."""
    return re.sub(r"\\(.)", r"\1", _unescape(text))


def _unescape(text: str) -> str:
    """Undo the octal escapes of mountinfo: blank, tab, newline, backslash, and others in options."""
    raw = re.sub(rb"\\([0-3][0-7]{2})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)
