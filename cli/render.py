# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for people: what inspect and diff print. All text from a checkpoint passes `printable`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cryoci.cli import output

if TYPE_CHECKING:
    from cryoci.ociimage.criu.processes import Process
    from cryoci.ociimage.report import Report


@dataclass(frozen=True)
class Shown:
    """Which parts to print; `pid` narrows the processes to one and those below it."""

    files: bool = False
    sockets: bool = False
    mounts: bool = False
    stats: bool = False
    annotations: bool = False
    cmd: bool = False
    env: bool = False
    pid: int | None = None


def report(found: Report, shown: Shown) -> None:
    """Print a checkpoint. Raises NotFoundError when `shown.pid` is no process of it."""
    _head(found)
    if found.layers:
        _section("layers")
        output.table(
            ("LAYER", "SIZE", "UNPACKED", "DIGEST"),
            [
                (x.holds or x.media_type, output.size(x.size), output.size(x.raw_size), x.digest)
                for x in found.layers
            ],
        )
    _section("processes")
    for line in tree(found, shown):
        click.echo(output.printable(line))
    if shown.mounts:
        _section("mounts")
        rows = [(m.place, m.type, m.source, "from the node" if m.external else "") for m in found.mounts]
        if not rows:
            rows = [(m.destination, m.type, m.source, "") for m in found.spec_mounts]
        output.table(("DESTINATION", "TYPE", "SOURCE", ""), sorted(rows))
    if shown.stats and found.statistics is not None:
        _section("dump")
        s = found.statistics
        output.pairs(
            [
                ("freezing", f"{s.freezing_time / 1000:.1f} ms"),
                ("frozen", f"{s.frozen_time / 1000:.1f} ms"),
                ("memory dump", f"{s.memdump_time / 1000:.1f} ms"),
                ("memory write", f"{s.memwrite_time / 1000:.1f} ms"),
                ("pages scanned", str(s.pages_scanned)),
                ("pages in parent", str(s.pages_skipped_parent)),
                ("pages written", str(s.pages_written)),
            ]
        )
    if shown.annotations:
        _section("annotations")
        output.pairs(sorted(found.annotations.items()))
    if found.compatibility:
        _section("this node")
        output.table(
            ("", "VERDICT", "CHECKPOINT", "HERE", ""),
            [(f.subject, f.verdict, f.there, f.here, f.why) for f in found.compatibility],
        )
    for problem in found.problems:
        click.echo(f"damaged: {output.printable(problem)}", err=True)
    if not found.complete:
        click.echo("some layers do not say what they hold and were not fetched: add --fetch", err=True)


def _head(found: Report) -> None:
    memory = [output.size(found.sizes.memory)] + (
        [f"GPU {output.size(found.sizes.gpu)}"] if found.sizes.gpu else []
    )
    size = f"{output.size(found.sizes.total)}: memory {', '.join(memory)}"
    size += f", file system {output.size(found.sizes.rootfs)}"
    if found.sizes.volumes:
        size += f", volumes {output.size(found.sizes.volumes)}"
    if found.image:
        size += f"; {output.size(found.image.size)} compressed"
    output.pairs(
        [
            ("reference", found.reference),
            ("digest", found.digest),
            ("manifest", found.manifest_digest),
            ("created", found.created),
            ("checkpointed", found.checkpointed),
            ("container", f"{found.container['name']} {found.container['id'][:12]}".strip()),
            ("pod", "/".join(filter(None, (found.pod["namespace"], found.pod["name"])))),
            ("engine", found.engine),
            ("base image", found.base_image["name"]),
            ("base digest", found.base_image["digest"]),
            ("runtime", found.runtime),
            ("criu", found.criu),
            ("host", " ".join(filter(None, (found.host["arch"], found.host["kernel"])))),
            ("host name", found.hostname),
            *((f"network {name}", " ".join(words)) for name, words in found.network.items()),
            *((f"gpu {key}", value) for key, value in sorted(found.gpu.items())),
            ("size", size),
        ]
    )


def tree(found: Report, shown: Shown) -> Iterator[str]:
    """The process tree, a line each, with what `shown` asks for below each process."""
    from cryoci.errors import NotFoundError
    from cryoci.ociimage.criu.processes import children

    below = children(found.processes)
    roots: Sequence[Process] = below.get(0, ())
    if shown.pid is not None:
        roots = [p for p in found.processes if p.pid == shown.pid]
        if not roots:
            raise NotFoundError(
                f"{found.reference} has no process {shown.pid}",
                hint=f"it has: {' '.join(str(p.pid) for p in found.processes[:20]) or 'none that could be read'}",
            )
    words = {w.pid: w for w in found.words}
    seen: set[int] = set()

    def lines(process: Process, depth: int) -> Iterator[str]:
        if process.pid in seen or depth > 200:
            return
        seen.add(process.pid)
        indent = "  " * depth
        said = words.get(process.pid)
        name = " ".join(said.command) if said and shown.cmd and said.command else process.name
        threads = f", {len(process.threads)} threads" if len(process.threads) > 1 else ""
        state = "" if process.state == "running" else f", {process.state}"
        memory = f"{output.size(process.memory.stored)} of {output.size(process.memory.virtual)}"
        yield f"{indent}{process.pid} {name} (uid {process.uid}{threads}{state}, {memory}) {process.program}"
        if said and shown.env:
            yield from (f"{indent}    env {line}" for line in said.environment)
        if shown.files:
            yield f"{indent}    cwd {process.directory}, root {process.root}"
            for file in process.files:
                where = f" at {file.position}" if file.position is not None else ""
                yield f"{indent}    fd {file.fd} {file.kind} {file.what}{where}"
        if shown.sockets:
            for s in process.sockets:
                sizes = f" (send {output.size(s.send_buffer)}, receive {output.size(s.receive_buffer)})"
                yield f"{indent}    socket {s.fd} {s.protocol} {s.state} {s.source} -> {s.destination}{sizes}"
        for child in below.get(process.pid, ()):
            yield from lines(child, depth + 1)

    for root in roots:
        yield from lines(root, 0)


def _section(title: str) -> None:
    click.echo()
    click.echo(f"{title}:")
