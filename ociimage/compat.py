# SPDX-License-Identifier: Apache-2.0
"""Would this node take a checkpoint: architecture, processor, kernel, CRIU, and what the processes need."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryoci.ociimage.criu.processes import Mount, Process
from cryoci.ociimage.manifest import goarch

OK, WARNING, PROBLEM, UNKNOWN = "ok", "warning", "problem", "unknown"


@dataclass(frozen=True)
class Finding:
    """One comparison: `verdict` is ok, warning, problem or unknown."""

    subject: str
    verdict: str
    there: str
    here: str
    why: str = ""


@dataclass(frozen=True)
class Node:
    """What a node is: as uname(2), /proc/cpuinfo and criu say."""

    machine: str
    kernel: str
    cpu_flags: frozenset[str]
    criu: str
    cgroup: str

    @staticmethod
    def here(criu: str) -> Node:
        """This node; `criu` is its version, or empty."""
        name = os.uname()
        unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        return Node(
            name.machine, name.release, _flags(Path("/proc/cpuinfo")), criu, "v2" if unified else "v1"
        )


def check(
    facts: Mapping[str, str], processes: Sequence[Process], mounts: Iterable[Mount], node: Node
) -> list[Finding]:
    """Compare what a checkpoint says about itself with `node`."""
    machine = facts.get("host.arch") or next((p.machine for p in processes if p.machine), "")
    same = goarch(machine) == goarch(node.machine)
    found = [
        Finding(
            "architecture",
            (OK if same else PROBLEM) if machine else UNKNOWN,
            machine,
            node.machine,
            "" if same else "processes run on the processor that they were made for",
        ),
        _kernel(facts.get("host.kernel", ""), node.kernel),
        _criu(facts.get("criu.version", ""), node.criu),
    ]
    if not machine or same:
        found.append(_cpu(facts, processes, node))
    if there := facts.get("cgroup.version"):
        verdict = OK if there == node.cgroup else WARNING
        why = "" if verdict == OK else "limits may not be restored as they were"
        found.append(Finding("cgroups", verdict, there, node.cgroup, why))
    if any(s.state == "established" for p in processes for s in p.sockets if s.protocol.startswith("tcp")):
        why = "needs --tcp-established and the same address, or --tcp-close"
        found.append(Finding("TCP connections", WARNING, "established", "", why))
    outer = sorted(
        {m.place for m in mounts if m.external and not m.place.startswith(("/proc", "/dev", "/sys"))}
    )
    if outer:
        why = "bind mounts: the engine must give the container each of them"
        found.append(Finding("mounts of the node", WARNING, " ".join(outer), "", why))
    return found


def _kernel(there: str, here: str) -> Finding:
    first, second = _version(there), _version(here)
    if not first or not second:
        return Finding("kernel", UNKNOWN, there, here)
    older = second < first
    why = "older than the one of the dump: CRIU may need what it lacks" if older else ""
    return Finding("kernel", WARNING if older else OK, there, here, why)


def _criu(there: str, here: str) -> Finding:
    first, second = _version(there), _version(here)
    if not second:
        return Finding("criu", PROBLEM, there, "", "not installed: apt-get install criu")
    if not first:
        return Finding("criu", UNKNOWN, there, here)
    older = second < first
    why = "older than the one of the dump: it may not know its images" if older else ""
    return Finding("criu", PROBLEM if older else OK, there, here, why)


def _cpu(facts: Mapping[str, str], processes: Sequence[Process], node: Node) -> Finding:
    needed = {flag for process in processes for flag in process.cpu} | set(
        facts.get("cpu.flags", "").split()
    )
    missing = sorted(needed - node.cpu_flags) if node.cpu_flags else []
    verdict = PROBLEM if missing else (OK if needed else UNKNOWN)
    why = "registers in use that this processor lacks" if missing else ""
    return Finding(
        "processor", verdict, " ".join(sorted(needed)), " ".join(missing) and f"no {' '.join(missing)}", why
    )


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part or 0) for part in match.groups()) if match else ()


def _flags(path: Path) -> frozenset[str]:
    try:
        text = path.read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()
