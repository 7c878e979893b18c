# SPDX-License-Identifier: Apache-2.0
"""The processes of a container, and locks between processes of cryoci."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoci.errors import ConflictError
from cryoci.shim.cgroup import tree

HELD = "held.json"  # in a container's record while a checkpoint holds it frozen


def private_memory(pid: int) -> int:
    """Bytes that a dump of `pid` and its descendants writes at most: anonymous and shared memory, swap."""
    if pid <= 0:
        return 0
    total = 0
    for one in tree(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
                total += int(line.split()[1]) << 10
    return total


@contextmanager
def exclusive(directory: Path, what: str) -> Iterator[Path]:
    """Only one operation at a time on the container whose record is `directory` (made here; yielded).

    Raises ConflictError, which says that another `what` is under way.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock(directory / "checkpoint.lock") as locked:
        if not locked:
            raise ConflictError(f"another {what} is under way", hint="wait for it to end")
        yield directory


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock file for a with block; yields whether it was to be had."""
    fd = _lock(path)
    if fd is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody waits on it, a late comer makes its own
        os.close(fd)


def _lock(path: Path) -> int | None:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its holder removed it between our open and our lock
