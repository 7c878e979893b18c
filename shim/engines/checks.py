# SPDX-License-Identifier: Apache-2.0
"""What speaks against a checkpoint, before anything of the container is touched."""

from __future__ import annotations

import shutil
from pathlib import Path

from cryoci.errors import ConflictError, SpaceError, UnsupportedError
from cryoci.shim import config, underlying
from cryoci.shim.engines import processes
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import DumpOptions
from cryoci.shim.gpu import tasks


def moves_connections(options: DumpOptions) -> bool:
    return bool(options.criu.tcp_established) and not options.leave_running


def moving(container: Container, options: DumpOptions) -> None:
    if moves_connections(options) and container.auto_remove:
        raise ConflictError(
            f"container {container.name} is removed by its engine when it stops (--rm), so its established "
            "connections cannot be moved safely",
            hint="add --leave-running, or start the container without --rm",
        )


def sink(container: Container, options: DumpOptions) -> None:
    """Memory that is stored elsewhere can only be put back into processes that are there."""
    if options.sink is None:
        return
    if moves_connections(options):
        raise UnsupportedError(
            "established connections that are to move end with the dump, and so would what memory comes back to when "
            "the checkpoint cannot be stored",
            hint="leave out --straight, or add --leave-running",
        )
    if below_podman(container):
        raise UnsupportedError(
            f"podman runs {container.name} by {container.facts['runtime.name']}, so CRIU moves all of its memory",
            hint="leave out --straight, or start it with `podman --runtime cryoci-runtime`",
        )


def plugin(container: Container, init: int, options: DumpOptions) -> None:
    """CRIU's CUDA plugin works while CRIU does, on memory that is where it was."""
    if options.sink is not None and config.load().gpu.engine == "plugin" and tasks.any_cuda(init):
        raise UnsupportedError(
            f"CRIU's CUDA plugin needs all memory of container {container.name} in its place",
            hint='leave out --straight, or set [gpu] engine = "driver"',
        )


def below_podman(container: Container) -> bool:
    """Will podman restore it by a runtime that knows nothing of cryoci?"""
    return container.engine == "podman" and container.facts.get("runtime.name") in underlying.DEFAULTS


def user(container: Container) -> None:
    """A dump that nobody could restore is refused."""
    namespaces = (container.spec.get("linux") or {}).get("namespaces") or ()
    if any(one.get("type") == "user" for one in namespaces):
        raise UnsupportedError(
            f"container {container.name} has a user namespace, and CRIU cannot restore such a one",
            hint="start it without (no --userns, --uidmap)",
        )


def space(container: Container, init: int, directory: Path, options: DumpOptions) -> None:
    """Refuse before anything is touched: CRIU needs about the resident memory, and the rw layer its size.

    How much is shared with a parent nobody knows before, nor how much goes past the directory.
    """
    if options.parent is not None or options.sink is not None:
        return
    need = processes.private_memory(init)
    free = shutil.disk_usage(directory).free
    if need > free:
        raise SpaceError(
            f"{directory} has {free >> 20} MiB free, and the processes of {container.name} hold {need >> 20} MiB",
            hint="free space there, give another directory, or set TMPDIR to one on a larger file system",
        )
