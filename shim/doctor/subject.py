# SPDX-License-Identifier: Apache-2.0
"""From a container's name to what its checks look at."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cryoci.shim import cgroup, config, engines
from cryoci.shim.criu.options import parse_size
from cryoci.shim.doctor.check import Facts
from cryoci.shim.doctor.container import GHOST_LIMIT, Subject
from cryoci.shim.engines.processes import private_memory


def container(name: str, *, root: str | None = None) -> Subject:
    """The running container `name` of this node. Raises NotFoundError, ConflictError, ConfigError."""
    found = engines.find(name, root=root)
    found.must_run()
    pid = int(found.state()["pid"])
    chosen = config.load().criu
    limit = chosen.ghost_limit
    return Subject(
        Facts(),
        tuple(dict.fromkeys((pid, *cgroup.tree(pid), *_namespace(pid)))),
        found.spec,
        GHOST_LIMIT if limit is None else parse_size(limit, "criu.ghost-limit"),
        private_memory(pid),
        _free(os.environ.get("TMPDIR") or "/var/lib/cryoci/tmp"),
        bool(chosen.tcp_established),
    )


def _namespace(pid: int) -> list[int]:
    """Processes in the PID namespace of `pid`: what was started by exec is no child of the container's first."""
    facts = Facts()
    own = facts.link(f"/proc/{pid}/ns/pid")
    if own == facts.link("/proc/self/ns/pid"):
        return []
    return [int(n) for n in facts.names("/proc") if n.isdigit() and facts.link(f"/proc/{n}/ns/pid") == own]


def _free(path: str) -> int:
    """Bytes free where `path` is, or would be."""
    where = Path(path)
    while not where.exists():
        where = where.parent
    return shutil.disk_usage(where).free
