# SPDX-License-Identifier: Apache-2.0
"""Have the checkpoint fetched and verified by `cryoci`, which may do what a runtime must not: speak to registries."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from cryoci.command import which
from cryoci.errors import NotFoundError, RestoreError
from cryoci.shim.annotated.request import Request


class Checkpoint:
    """A verified checkpoint on this node: `facts` by their short names (ociimage.annotations)."""

    __slots__ = ("digest", "directory", "facts")

    def __init__(self, directory: Path, digest: str, facts: dict[str, str]) -> None:
        self.directory = directory
        self.digest = digest
        self.facts = facts

    @property
    def images(self) -> Path:
        """CRIU's images."""
        return self.directory / "checkpoint"


def fetch(request: Request, place: Path) -> Checkpoint:
    """Fetch what was asked for into `place`. Raises RestoreError with what `cryoci` said."""
    argv = [program(), "fetch", request.reference, str(place)]
    if request.pod_namespace is not None:
        argv += ["--pod-namespace", request.pod_namespace]
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
    if result.returncode != 0:
        raise _failure(request, result.stderr.decode(errors="replace"))
    said: dict[str, Any] = json.loads(result.stdout)
    return Checkpoint(Path(said["directory"]), said["digest"], said["facts"])


def program() -> str:
    """Path of the `cryoci` that was installed with this package: PREFIX/lib/pythonX/site-packages -> PREFIX/bin.

    Raises NotFoundError.
    """
    at = Path(__file__).parents[3]  # ROOT/cryoci/shim/annotated/fetch.py
    for directory in (at, *list(at.parents)[:4]):
        found = directory / "bin" / "cryoci"
        if os.access(found, os.X_OK):
            return str(found)
    try:
        return which("cryoci")
    except NotFoundError as e:
        raise NotFoundError(
            f"no program cryoci beside {at} or on PATH", hint="install cryoci again, with its command line"
        ) from e


def _failure(request: Request, said: str) -> RestoreError:
    """`cryoci: MESSAGE` and `hint: HINT` as an error of ours."""
    message, _, hint = said.strip().removeprefix("cryoci: ").partition("\nhint: ")
    return RestoreError(
        f"cannot restore {request.reference} (annotation {request.key}): {message or 'cryoci gave no reason'}",
        hint=" ".join(hint.split("\n")) or None,
    )
