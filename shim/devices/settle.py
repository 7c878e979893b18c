# SPDX-License-Identifier: Apache-2.0
"""After a restore: the device nodes below the container's /dev become those of this node.

CRIU brings the old node's /dev back, as content of a tmpfs. The container owns that directory and may have
put links there, so every step is taken from a directory descriptor and follows none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

from cryoci.errors import RestoreError

_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def settle(pid: int, devices: Mapping[str, Any]) -> list[str]:
    """Make `devices["nodes"]` and remove `devices["stale"]` in the root of process `pid`; returns what changed.

    Idempotent. Raises RestoreError with the node that could not be made.
    """
    changed: list[str] = []
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in devices.get("stale") or ():
            changed += _remove(root, path)
        for node in devices.get("nodes") or ():
            changed += _make(root, node)
    finally:
        os.close(root)
    return changed


def _parent(root: int, path: str, *, make: bool) -> int:
    """Descriptor of the directory of `path` below `root`. Raises OSError; ELOOP or ENOTDIR at a link."""
    at = os.dup(root)
    try:
        for part in [p for p in path.split("/")[:-1] if p]:
            if part in (".", ".."):
                raise OSError(22, "not a plain path", path)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                below = os.open(part, flags, dir_fd=at)
            except FileNotFoundError:
                if not make:
                    raise
                os.mkdir(part, 0o755, dir_fd=at)
                below = os.open(part, flags, dir_fd=at)
            os.close(at)
            at = below
    except BaseException:
        os.close(at)
        raise
    return at


def _remove(root: int, path: str) -> list[str]:
    """Remove a device node of the old node; anything else that has its name stays."""
    try:
        directory = _parent(root, path, make=False)
    except OSError:
        return []
    try:
        name = path.rpartition("/")[2]
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            os.unlink(name, dir_fd=directory)
            return [f"-{path}"]
    except OSError:
        pass  # gone, or a mount: no way in any more, as the device cgroup forbids it
    finally:
        os.close(directory)
    return []


def _make(root: int, node: Mapping[str, Any]) -> list[str]:
    path = str(node["path"])
    kind = _TYPES[node["type"]]
    number = os.makedev(int(node.get("major", 0)), int(node.get("minor", 0)))
    name = path.rpartition("/")[2]
    try:
        directory = _parent(root, path, make=True)
        try:
            try:
                there = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                there = None
            if there is not None:
                if stat.S_IFMT(there.st_mode) == kind and there.st_rdev == number:
                    return []
                os.unlink(name, dir_fd=directory)
            mode = int(node.get("fileMode", 0o666)) & 0o7777
            before = os.umask(0)
            try:
                os.mknod(name, kind | mode, number, dir_fd=directory)
            finally:
                os.umask(before)
            owner = (int(node.get("uid", 0)), int(node.get("gid", 0)))
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(directory)
    except OSError as e:
        raise RestoreError(
            f"cannot make device {path} in the restored container: {e.strerror}",
            hint="its /dev must be a directory of its own (a tmpfs), without links on the way",
        ) from e
    return [f"+{path}"]
