# SPDX-License-Identifier: Apache-2.0
"""What a runtime that was killed in a restore leaves behind: a mount of the container's root directory.

runc   STATE/ID/criu-root   `runc delete --force` removes the container's own files through it (libcontainer,
                            os.RemoveAll of the state directory), and still ends with status 0; a later restore
                            fails: "container with given ID already exists"
crun   BUNDLE/criu-root     a later restore fails: "error creating restore directory: File exists"
"""

from __future__ import annotations

import os
from contextlib import suppress

from cryoci.command import at_work, run

_NAME = "criu-root"
_RUNC = "/run/runc"  # for root, without --root (runc's main.go)


def sweep(kind: str, root: str | None, container: str, bundle: str) -> None:
    """Remove it, so that the container can be restored. Never raises; nor does it touch what is in use."""
    directory = bundle if kind == "crun" else f"{root or _RUNC}/{container}"
    try:
        found = os.listdir(directory)
        if (_NAME not in found if kind == "crun" else found not in ([], [_NAME])) or _at_work(container):
            return
    except OSError:
        return
    unmount(directory)
    with suppress(OSError):
        if _NAME in found:
            os.rmdir(f"{directory}/{_NAME}")
        if kind != "crun":
            os.rmdir(directory)


def unmount(directory: str) -> None:
    """Take the mount in a directory away, so that a deletion does not reach the container's files. Never raises."""
    # os.path.ismount does not see bind mounts within one file system
    while run(["umount", "--lazy", "--", f"{directory}/{_NAME}"], check=False).returncode == 0:
        pass


def _at_work(container: str) -> bool:
    """Whether a runtime makes it just now."""
    return any(os.path.basename(words[0]) in ("runc", "crun") and container in words for words in at_work())
