# SPDX-License-Identifier: Apache-2.0
"""What changed between two checkpoints: processes, memory, files, sockets, mounts, facts, sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from cryoci.ociimage.criu.processes import Process
from cryoci.ociimage.report import Report

ADDED, REMOVED, CHANGED, SAME = "added", "removed", "changed", "same"
SECTIONS = ("container", "sizes", "process", "memory", "file", "socket", "mount", "words")


@dataclass(frozen=True)
class Change:
    """One difference: `subject` names what, `before` and `after` are its two states, empty where absent."""

    kind: str
    section: str
    subject: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """Two checkpoints side by side; `memory` is the growth of stored memory in bytes.

    `same_container` says whether both are of one container, by its id: a container that was restored has another.
    `counts` has the number of changes by section and kind, those that are the same included.
    """

    before: str
    after: str
    same_container: bool
    memory: int
    total: int
    counts: Mapping[str, Mapping[str, int]]
    changes: tuple[Change, ...]


def compare(
    before: Report, after: Report, *, unchanged: bool = False, only: Collection[str] = SECTIONS
) -> Difference:
    """The changes from one checkpoint to another, of the sections `only`; with `unchanged` what is the same too."""
    changes = [
        *_maps("container", _facts(before), _facts(after)),
        *_maps("sizes", _sizes(before), _sizes(after)),
        *_maps("process", _processes(before), _processes(after)),
        *_maps("memory", _memory(before), _memory(after)),
        *_maps("file", _files(before), _files(after)),
        *_maps("socket", _sockets(before), _sockets(after)),
        *_maps("mount", _mounts(before), _mounts(after)),
        *_maps("words", _words(before), _words(after)),
    ]
    changes = [change for change in changes if change.section in only]
    counts = {
        section: dict(Counter(c.kind for c in changes if c.section == section))
        for section in SECTIONS
        if section in only
    }
    if not unchanged:
        changes = [change for change in changes if change.kind != SAME]
    return Difference(
        before.reference,
        after.reference,
        before.container["id"] == after.container["id"],
        after.sizes.memory - before.sizes.memory,
        after.sizes.total - before.sizes.total,
        counts,
        tuple(changes),
    )


def _maps(section: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for subject in _ordered([*before, *after]):
        first, second = before.get(subject), after.get(subject)
        if first is None:
            yield Change(ADDED, section, subject, "", second or "")
        elif second is None:
            yield Change(REMOVED, section, subject, first, "")
        else:
            yield Change(SAME if first == second else CHANGED, section, subject, first, second)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _facts(report: Report) -> dict[str, str]:
    found = {
        "name": report.container["name"],
        "id": report.container["id"],
        "engine": report.engine,
        "runtime": report.runtime,
        "criu": report.criu,
        "checkpointed": report.checkpointed,
        **{f"base image {key}": value for key, value in report.base_image.items()},
        **{f"host {key}": value for key, value in report.host.items()},
        **{f"gpu {key}": value for key, value in report.gpu.items()},
        **{f"network {key}": " ".join(words) for key, words in report.network.items()},
    }
    return {key: value for key, value in found.items() if value}


def _sizes(report: Report) -> dict[str, str]:
    return {field.name: str(getattr(report.sizes, field.name)) for field in fields(report.sizes)}


def _processes(report: Report) -> dict[str, str]:
    return {
        _who(p): f"{p.program} uid {p.uid}, {len(p.threads)} threads, {p.state}" for p in report.processes
    }


def _memory(report: Report) -> dict[str, str]:
    return {
        _who(p): f"{p.memory.stored} stored, {p.memory.virtual} mapped, heap {p.memory.heap}"
        for p in report.processes
    }


def _files(report: Report) -> dict[str, str]:
    return {
        f"{_who(p)} fd {file.fd}": f"{file.kind} {file.what}"
        + (f" at {file.position}" if file.position is not None else "")
        for p in report.processes
        for file in p.files
    }


def _sockets(report: Report) -> dict[str, str]:
    return {
        f"{_who(p)} fd {s.fd}": f"{s.protocol} {s.state} {s.source} -> {s.destination}"
        for p in report.processes
        for s in p.sockets
    }


def _mounts(report: Report) -> dict[str, str]:
    return {m.place: f"{m.type} {m.source}" for m in report.mounts}


def _words(report: Report) -> dict[str, str]:
    return {
        f"{w.pid} {what}": " ".join(value)
        for w in report.words
        for what, value in (("command", w.command), ("environment", w.environment))
    }


def _who(process: Process) -> str:
    return f"{process.pid} {process.name}"
