# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint that failed leaves: nothing, unless it holds what is nowhere else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cryoci.errors import ConflictError
from cryoci.files import keep
from cryoci.shim.engines.container import Container
from cryoci.shim.memory import journal
from cryoci.shim.record import Record


def aside(container: Container, directory: Path) -> Path:
    """Take `directory` out of the scratch directory that it lies in, and goes with; returns where it is until the next
    boot. Raises OSError."""
    kept = directory.parent.with_name(f"kept.{container.id[:64]}.{os.getpid()}")
    directory.rename(kept)
    keep(kept, True)
    return kept


def discard(container: Container, directory: Path, *, durable: bool) -> None:
    """Remove `directory`, unless the container's memory could not be put back and is there alone.

    One that is not `durable` is put aside then. Raises OSError.
    """
    record = Record(container.root, container.id)
    try:
        found = journal.read(record)
    except ConflictError:
        return  # nobody knows what is needed
    inside = found is not None and Path(found.directory).is_relative_to(os.path.abspath(directory))
    if found is None or found.source or not inside:
        shutil.rmtree(directory, ignore_errors=True)
    elif not durable:
        found.at(record, f"{aside(container, directory)}/checkpoint")


def release(container: Container, held: Path) -> None:
    """Forget in `held` that a checkpoint has frozen the container, unless `cryoci repair` is to thaw it."""
    try:
        if journal.read(Record(container.root, container.id)) is not None:
            return
    except ConflictError:
        return
    held.unlink(missing_ok=True)
