# SPDX-License-Identifier: Apache-2.0
"""A log file, explained for people and machines."""

from __future__ import annotations

from typing import Any

from cryoci.errors import NotFoundError
from cryoci.shim.criu import log

SCHEMA = "io.cryoci.explain/1"


def explain_file(path: str) -> dict[str, Any]:
    """The JSON form of a log's cause (docs/doctor.md). Raises NotFoundError when it cannot be read."""
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - log.TAIL))
            text = f.read().decode(errors="replace")
    except OSError as e:
        raise NotFoundError(
            f"cannot read {path}: {e.strerror}",
            hint="give a container's name or id instead, or look in /run/cryoci/containers/",
        ) from e
    cause = log.explain_text(text, log.verb_of(text, path), anywhere=True)
    return {
        "schema": SCHEMA,
        "subject": path,
        "ok": cause is None,
        "cause": None if cause is None else vars(cause),
    }
