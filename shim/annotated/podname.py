# SPDX-License-Identifier: Apache-2.0
"""The host name of a pod: CRIU gives the one of the checkpoint to whatever UTS namespace the processes come back in.

In a pod that is the namespace of all of its containers, so its name is noted before a restore, and put back; a name in
the container's specification comes first, as a runtime gives it on create.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from cryoci.errors import RestoreError
from cryoci.shim import netns


def noted(spec: Mapping[str, Any]) -> Callable[[], None]:
    """What puts back the name of the UTS namespace that the container of `spec` joins; nothing where it has its own.

    Raises RestoreError, and so does what is returned.
    """
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    path = next((one["path"] for one in namespaces if one.get("type") == "uts" and one.get("path")), None)
    if path is None:
        return lambda: None
    names: list[str] = []
    _within(path, lambda: names.append(os.uname().nodename))
    name = str(spec.get("hostname") or names[0])
    return lambda: _within(path, lambda: socket.sethostname(name))


def _within(path: str, act: Callable[[], None]) -> None:
    """Call `act` in the UTS namespace at `path`, which a thread enters; this process stays where it is."""
    try:
        netns.within_path(path, "uts", act)
    except OSError as e:
        raise RestoreError(
            f"the host name of the pod cannot be kept: {os.strerror(e.errno or 0)} ({path})",
            hint="its UTS namespace is gone: make the pod again",
        ) from e
