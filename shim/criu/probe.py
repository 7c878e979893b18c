# SPDX-License-Identifier: Apache-2.0
"""Which CRIU is installed: asked once per boot and binary."""

from __future__ import annotations

import dataclasses
import os
import re

from cryoci.command import run
from cryoci.errors import NotFoundError, ToolError, UnsupportedError
from cryoci.files import read_json, write_json
from cryoci.shim import paths, underlying

MINIMUM = 31600  # what engines ask for (CRI-O: CheckForCriu(31600))
FROZEN = 40100  # plugins may run while the container's cgroup is frozen, as CRI-O and containerd freeze it
CONFIG_API = 40200  # libcriu has criu_set_config_file, which crun needs for configuration files


@dataclasses.dataclass(frozen=True)
class CriuVersion:
    """`version` as CRIU counts: 40101 is 4.1.1."""

    path: str
    version: int

    def __str__(self) -> str:
        return ".".join(
            str(n) for n in (self.version // 10000, self.version // 100 % 100, self.version % 100)
        )


def probe(minimum: int = MINIMUM) -> CriuVersion:
    """The `criu` that runc and crun would start (from PATH), at least `minimum`.

    Raises NotFoundError when there is none, ToolError when it does not answer, UnsupportedError when it
    is too old.
    """
    path = underlying.search("criu", "")
    if path is None:
        raise NotFoundError("criu is not installed: no such program on PATH", hint="apt-get install criu")
    stamp = underlying.stamp(path)
    cache = paths.run_directory() + "/criu.json"
    try:
        saved = read_json(cache)
        if saved["path"] == path and stamp is not None and saved["stamp"] == list(stamp):
            return _at_least(CriuVersion(path, int(saved["version"])), minimum)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = CriuVersion(path, parse(run([path, "--version"], timeout=20).stdout.decode(errors="replace")))
    try:
        os.makedirs(paths.run_directory(), mode=0o700, exist_ok=True)
        write_json(cache, {"path": path, "stamp": stamp, "version": found.version})
    except OSError:
        pass  # asked again next time
    return _at_least(found, minimum)


def parse(text: str) -> int:
    """Version number in the output of `criu --version`. Raises ToolError."""
    match = re.search(r"^Version: (\d+)\.(\d+)(?:\.(\d+))?", text, re.MULTILINE)
    if match is None:
        raise ToolError(f"criu --version says {text[:200]!r}, which holds no version", hint="reinstall criu")
    major, minor, sublevel = (int(n or 0) for n in match.groups())
    return major * 10000 + minor * 100 + sublevel


def _at_least(found: CriuVersion, minimum: int) -> CriuVersion:
    if found.version < minimum:
        wanted = CriuVersion("", minimum)
        raise UnsupportedError(
            f"criu {found} ({found.path}) is too old", hint=f"install criu {wanted} or newer"
        )
    return found
