# SPDX-License-Identifier: Apache-2.0
"""Containers that were not created through cryoci-runtime, for the time of a call.

cryoci-runtime is told by a record which runtime made the container, and the record goes with the call. Several callers
at once share it: each holds adopt.lock in it, and the last one removes it, also after one that was killed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cryoci.shim.record import Record

_LOCK = "adopt.lock"


@contextmanager
def adopted(root: str | None, container: str, runtime: str, bundle: str) -> Iterator[None]:
    """cryoci-runtime knows the container, made by `runtime`, within the with block. Raises OSError."""
    known = Record(root, container)
    if owned(known):
        yield
        return
    fd = _share(known, runtime, bundle)
    try:
        yield
    finally:
        _leave(known, fd)


def owned(known: Record) -> bool:
    """Whether the record is that of a container of cryoci-runtime's, which goes with it."""
    return known.load() is not None and not _borrowed(known)


def _borrowed(known: Record) -> bool:
    return bool(known.facts.get("adopted"))


def _share(known: Record, runtime: str, bundle: str) -> int:
    """Have the record there, and hold its lock with the others who want it there; returns the lock."""
    path = f"{known.directory}/{_LOCK}"
    while True:
        known.make()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the directory went with the last of the others
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if not known.exists:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if _current(fd, path) and not known.exists:
                    known.save(runtime, {"bundle": bundle, "adopted": True}, "")
                fcntl.flock(fd, fcntl.LOCK_SH)
            # between two locks the last of the others may have removed it
            if _current(fd, path) and known.exists:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _leave(known: Record, fd: int) -> None:
    """Remove the record, unless somebody else holds it, or it has become the container's own. Never raises."""
    path = f"{known.directory}/{_LOCK}"
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _current(fd, path):
            if known.load() is not None and _borrowed(known):
                known.disown()
            os.unlink(path)
            os.rmdir(known.directory)
    os.close(fd)


def _current(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
