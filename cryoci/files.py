# SPDX-License-Identifier: Apache-2.0
"""Small state on disk: atomic writes, so that a crash leaves the old file or the new one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

_SCRATCH = Path("/var/lib/cryoci/tmp")
_KEEP = ".keep"  # a file beside a scratch directory, with the boot that it counts for


def write_atomic(path: str | os.PathLike[str], data: bytes | str, *, mode: int = 0o600) -> None:
    """Replace `path` with `data`: write a sibling, fsync it, rename it, fsync the directory.

    `mode` is the permission bits of the new file. Raises OSError; the old file is then untouched.
    """
    path = os.fspath(path)
    directory = os.path.dirname(path) or "."
    temporary = os.path.join(directory, f".{os.path.basename(path)}.{os.getpid()}.tmp")
    raw = data.encode() if isinstance(data, str) else data
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as f:
            os.fchmod(f.fileno(), mode)
            f.write(raw)
            f.flush()
            os.fsync(f.fileno())
        os.rename(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
    sync_directory(directory)


def write_json(path: str | os.PathLike[str], value: Any, *, mode: int = 0o600) -> None:
    """`write_atomic` of `value` as indented JSON with a final newline."""
    write_atomic(path, json.dumps(value, indent=2) + "\n", mode=mode)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file of our own. Raises OSError or json.JSONDecodeError."""
    with open(path, "rb") as f:
        return json.load(f)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """fsync a directory, so that a rename in it survives power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(top: str | os.PathLike[str]) -> None:
    """fsync every file and directory below `top`, and its own entry in its parent."""
    for directory, _, names in os.walk(top):
        for name in names:
            fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(directory)
    sync_directory(os.path.dirname(os.path.abspath(top)))


_mine: set[Path] = set()  # scratch directories in use


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A private directory for the time of a with block: below $TMPDIR, else below /var/lib/cryoci/tmp.

    Not /tmp: it is often memory, and a checkpoint is as large as the memory of its container. What killed
    processes have left in the latter, which is cryoci's alone, goes at the next call. Whoever is not root has no
    other place than the system's.
    """
    own = _SCRATCH
    base = Path(os.environ.get("TMPDIR") or (own if os.geteuid() == 0 else tempfile.gettempdir()))
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(own) if base == own else nullcontext():  # nobody sweeps what is not locked yet
            if base == own:
                _sweep(own)
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=base)))
            stack.enter_context(_locked(made))
        _mine.add(made.resolve())
        try:
            yield made
        finally:
            _mine.discard(made.resolve())


def passing(path: Path) -> bool:
    """Does `path` lie in a scratch directory of this process, and go with it?"""
    return any(path.resolve().is_relative_to(place) for place in _mine)


def keep(path: str | os.PathLike[str], wanted: bool) -> None:
    """Mark what `path` lies in, a scratch directory, as not to be swept until the next boot; or unmark it.

    Does nothing for a path elsewhere. Raises OSError.
    """
    try:
        top = Path(path).resolve().relative_to(_SCRATCH).parts[0]
    except (ValueError, IndexError):
        return
    mark = _SCRATCH / f"{top}{_KEEP}"
    if wanted:
        write_atomic(mark, _boot())
    else:
        mark.unlink(missing_ok=True)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sweep(base: Path) -> None:
    """Remove the directories whose makers are gone: those hold a lock as long as they live."""
    for path in base.iterdir():
        if path.name.endswith(_KEEP):
            continue
        mark = path.with_name(path.name + _KEEP)
        if mark.exists() and mark.read_text() == _boot():
            continue
        mark.unlink(missing_ok=True)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
