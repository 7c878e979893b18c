# SPDX-License-Identifier: Apache-2.0
"""Where the last attempts on a container left their logs: found by its name or id, by id also when it is gone."""

from __future__ import annotations

import os
import time

from cryoci.errors import CryociError, NotFoundError
from cryoci.shim import engines, paths, remains
from cryoci.shim.record import Record

_LOGS = ("dump.log", "restore.log")
_SHOWN = 5


def directory(container: str) -> str:
    """The record of `container`: an id, the beginning of one, or the name of one that is there.

    Raises NotFoundError, which lists the latest that are known.
    """
    known = remains.directories()
    found = [d for d in known if container and os.path.basename(d).startswith(container)]
    found = [d for d in found if os.path.basename(d) == container] or found
    if not found and container:
        found = [d for d in known if d == _by_name(container)]
    if len(found) == 1:
        return found[0]
    latest = sorted(known, key=_latest, reverse=True)[:_SHOWN]
    shown = "; ".join(f"{os.path.basename(d)[:12]} ({', '.join(_words(d))})" for d in latest)
    raise NotFoundError(
        f"{'no container' if not found else 'more than one container'} {container} has a record or logs of "
        "cryoci-runtime",
        hint=(
            f"the latest are: {shown}" if shown else f"nothing is in {paths.run_directory()}/containers yet"
        )
        + "; once its engine has removed a container, it is found by its id only",
    )


def log(container: str) -> str:
    """Path of CRIU's last log of `container`. Raises NotFoundError."""
    where = directory(container)
    there = [f"{where}/{name}" for name in _LOGS if os.path.isfile(f"{where}/{name}")]
    if not there:
        raise NotFoundError(
            f"container {container} has no log of CRIU: no checkpoint or restore of it got that far",
            hint=f"see `cryoci debug {container}` for what is known of it",
        )
    return max(there, key=_changed)


def _by_name(name: str) -> str | None:
    try:
        found = engines.find(name)
        return Record(found.root, found.id).directory
    except CryociError:
        return None


def _words(where: str) -> list[str]:
    """The attempts that left a log, with their times; how else it is known."""
    logs = [name for name in _LOGS if os.path.isfile(f"{where}/{name}")]
    return [
        f"{name.partition('.')[0]} {time.strftime('%d %b %H:%M', time.localtime(_changed(f'{where}/{name}')))}"
        for name in logs
    ] or ["created"]


def _latest(where: str) -> float:
    """When its last log was written; for one without, when anything of it was."""
    return max((_changed(f"{where}/{name}") for name in _LOGS), default=0.0) or _changed(where)


def _changed(path: str) -> float:
    """Seconds since the epoch; 0 for what is not there."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
