# SPDX-License-Identifier: Apache-2.0
"""What was tried when a dump or restore failed: kept beside CRIU's log, and like it outliving the record."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from cryoci import redact
from cryoci.shim import state

if TYPE_CHECKING:
    from cryoci.shim.record import Record


def path(record: Record, verb: str) -> str:
    """Where the last failed attempt of `verb` ("dump", "restore") is described."""
    return f"{record.directory}/{verb}-attempt.log"


def keep(
    record: Record, verb: str, argv: list[str], began: float, status: int, extra: dict[str, Any]
) -> None:
    """Describe an attempt that failed; `began` is a time.time(). Never raises: it is only for finding faults."""
    now = time.time()
    value = {
        "verb": verb,
        "argv": redact.words(argv),
        "directory": os.getcwd(),
        "environment": [redact.variable(f"{k}={v}") for k, v in sorted(os.environ.items())],
        "began": _stamp(began),
        "ended": _stamp(now),
        "seconds": round(now - began, 3),
        "status": status,
        **extra,
    }
    try:
        record.make()
        state.write(path(record, verb), json.dumps(value, indent=1).encode() + b"\n")
    except OSError:
        pass


def _stamp(t: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(t)) + f".{int(t % 1 * 1000):03d}Z"
