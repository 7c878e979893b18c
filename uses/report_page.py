# SPDX-License-Identifier: Apache-2.0
"""The page of an `Operation` (reporting.py): its head, and one section for each thing that somebody may ask."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from cryoci import __version__, timeline
from cryoci.amounts import seconds, size
from cryoci.ociimage import chunks, compat
from cryoci.ociimage.report import Report
from cryoci.page import (
    Html,
    Section,
    bar_cell,
    bullets,
    cell,
    contents,
    document,
    facts,
    fold,
    heading,
    join,
    paragraph,
    table,
    text,
    tiles,
)
from cryoci.shim.gpu.dump import Dump
from cryoci.uses.report import Held
from cryoci.uses.report_memory import memory, processes
from cryoci.uses.reporting import Operation

_ROWS, _UNFOLDED = 200, 10  # of a table of layers or files: the most, and those that are seen at once
_TONES = {compat.OK: "good", compat.WARNING: "warn", compat.PROBLEM: "bad", compat.UNKNOWN: ""}
_BYTES = 1 << 62  # the most that a checkpoint may say of anything


def page(operation: Operation, held: Held | None, problem: str) -> str:
    """The page; `held` is None when there was nothing to look at, and `problem` may say why."""
    warned = _warnings(operation, held, problem)
    report = held.report if held else None
    sections = [one for one in _sections(operation, held, warned) if one.body]
    chip, tone = ("failed", "bad") if operation.error else ("done", "good")
    if not operation.error and warned:
        done = "" if operation.recorded is None else "done, "
        chip, tone = f"{done}{len(warned)} warning{'s' if len(warned) > 1 else ''}", "warn"
    if operation.recorded is None and not warned:
        chip = ""  # nothing was done that could have failed
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(operation.ended))
    head = heading(operation.title, chip, tone, f"{when}, cryoci {__version__}")
    body = join(one.html() for one in sections)
    numbers = tiles(_tiles(operation, report, held.gpus if held else None))
    return document(operation.title, Html(f"{head}{numbers}{contents(sections)}<main>\n{body}</main>"))


def _sections(operation: Operation, held: Held | None, warned: Sequence[str]) -> Iterator[Section]:
    if operation.error:
        body = paragraph(operation.error) + (
            paragraph(f"What to do: {operation.hint}") if operation.hint else ""
        )
        yield Section("failure", "Why it failed", Html(body), "bad")
    if warned:
        yield Section("warnings", "Warnings", bullets(warned), "warn")
    yield Section("timeline", "Timeline", _timeline(operation))
    if held is None:
        return
    report = held.report
    yield Section("sizes", "Sizes", _sizes(report))
    yield Section("processes", "Processes", processes(report))
    yield Section("memory", "Memory map", memory(held.maps))
    yield Section("gpus", "GPUs", _gpus(held.gpus) if held.gpus else Html(""))
    yield Section("node", "Checkpoint and this node", _node(report))
    yield Section("versions", "Versions and origin", _origin(operation, held))


def _warnings(operation: Operation, held: Held | None, problem: str) -> list[str]:
    found = [*operation.warnings]
    if problem:
        found.append(problem)
    if held is None:
        return found
    found += [*held.report.problems, *held.problems]
    for one in held.report.compatibility:
        if one.verdict == compat.PROBLEM:  # what is merely odd stands in the table
            found.append(f"{one.subject}: {one.why or f'{one.there} there, {one.here} here'}")
    if not held.report.complete and not held.report.problems:
        found.append(
            "layers that do not say what they hold were not fetched: sizes and processes may lack some"
        )
    return found


def _tiles(operation: Operation, report: Report | None, gpus: Dump | None) -> Iterator[tuple[str, str]]:
    recorded = operation.recorded
    if recorded is not None and recorded.seconds:
        yield "in all", seconds(recorded.seconds)
    if report is None:
        return
    if report.statistics is not None:
        yield "frozen, as CRIU measured", seconds(report.statistics.frozen_time / 1e6)
    yield "checkpoint", size(report.sizes.total)
    if report.image is not None:
        yield "image, compressed", size(report.image.size)
    memory_bytes = report.sizes.memory + _out_of_band(report)
    yield "memory", size(memory_bytes) if memory_bytes else ""
    if gpus is not None and gpus.tasks:
        yield "GPU memory", size(_clamp(sum(_clamp(n) for task in gpus.tasks for n in task.vram.values())))
    yield "processes", str(len(report.processes)) if report.processes else ""


def _timeline(operation: Operation) -> Html:
    recorded = operation.recorded
    if recorded is None or not recorded.steps:
        return Html("")
    drawn = timeline.explained(recorded.steps, recorded.seconds)
    if not operation.seconds:
        return drawn
    steps = facts((name, seconds(spent)) for name, spent in operation.seconds.items())
    return Html(f"{drawn}<h3>Steps</h3>{steps}")


def _sizes(report: Report) -> Html:
    sizes = report.sizes
    apart = _out_of_band(report)
    parts = [
        (1, "memory by CRIU", sizes.memory),
        (2, "memory out of band", apart),
        (4, "GPU memory (AMD)", sizes.gpu),
        (5, "file system", sizes.rootfs),
        (6, "volumes", sizes.volumes),
    ]
    parts.append(
        (3, "descriptions and all else", max(0, sizes.total - sum(amount for _, _, amount in parts)))
    )
    shown = [part for part in parts if part[2]]
    rows = (
        (cell(name), cell(size(amount), "n"), bar_cell([(color, amount)], sizes.total))
        for color, name, amount in shown
    )
    head = table("What it is made of, before compression", ("part", "size", "share"), rows, ("size",))
    return Html(head + (_layers(report) if report.layers else _files(report)))


def _out_of_band(report: Report) -> int:
    return sum(n for name, n in report.files.items() if name.startswith(chunks.PREFIX))


def _layers(report: Report) -> Html:
    layers = sorted(report.layers, key=lambda one: -one.size)
    most = max((one.size for one in layers), default=0)
    rows = [
        (
            cell(one.holds or one.media_type),
            cell(size(one.size), "n"),
            cell(size(one.raw_size), "n"),
            bar_cell([(1, one.size)], most),
            cell(one.digest.removeprefix("sha256:")[:16], "mono"),
        )
        for one in layers[:_ROWS]
    ]
    columns = ("layer", "size", "unpacked", "", "digest")
    return _largest("layers", len(layers), columns, rows, ("size", "unpacked"))


def _files(report: Report) -> Html:
    found = sorted(report.files.items(), key=lambda one: (-one[1], one[0]))
    most = max((amount for _, amount in found), default=0)
    rows = [(cell(name), cell(size(n), "n"), bar_cell([(1, n)], most)) for name, n in found[:_ROWS]]
    return _largest("files", len(found), ("file", "size", ""), rows, ("size",))


def _largest(
    what: str, count: int, columns: Sequence[str], rows: Sequence[Sequence[Html]], numbers: Sequence[str]
) -> Html:
    """A table of the largest, and the others folded away."""
    first = table(f"{count} {what}, largest first", columns, rows[:_UNFOLDED], numbers)
    if len(rows) <= _UNFOLDED:
        return first
    left = f"; {count - _ROWS} smaller ones are not shown" if count > _ROWS else ""
    rest = table(f"More {what}{left}", columns, rows[_UNFOLDED:], numbers)
    return Html(first + fold(text(f"{len(rows) - _UNFOLDED} more{left}"), rest))


def _gpus(dump: Dump) -> Html:
    used = {
        gpu["uuid"]: _clamp(sum(_clamp(task.vram.get(gpu["uuid"], 0)) for task in dump.tasks))
        for gpu in dump.gpus
    }
    gpus = (
        (
            cell(gpu["index"], "n"),
            cell(gpu["name"]),
            cell(gpu["capability"]),
            cell(size(used[gpu["uuid"]]), "n"),
            cell(size(_clamp(gpu["memory"])), "n"),
            bar_cell([(1, used[gpu["uuid"]])], _clamp(gpu["memory"])),
            cell(gpu["uuid"], "mono"),
        )
        for gpu in dump.gpus
    )
    columns = ("index", "GPU", "capability", "held", "has", "", "UUID")
    first = table("GPUs that the container saw", columns, gpus, ("index", "held", "has"))
    names = {gpu["uuid"]: gpu["index"] for gpu in dump.gpus}
    tasks = (
        (
            cell(task.inner, "n"),
            cell(task.comm),
            cell(names.get(uuid, "?"), "n"),
            cell(size(_clamp(amount)), "n"),
        )
        for task in dump.tasks[:_ROWS]
        for uuid, amount in (task.vram or {"": 0}).items()
    )
    second = table("CUDA processes", ("pid", "process", "GPU", "held"), tasks, ("pid", "GPU", "held"))
    words = facts(
        [
            ("driver", dump.driver),
            ("CUDA", f"{dump.cuda // 1000}.{dump.cuda % 1000 // 10}" if 0 < dump.cuda < 1 << 31 else ""),
            ("brought out by", dump.engine),
            ("in use", ", ".join(sorted(name for name, on in dump.flags.items() if on))),
            ("CDI devices", ", ".join(dump.devices)),
        ]
    )
    return Html(first + second + words)


def _node(report: Report) -> Html:
    rows = (
        (
            cell(one.subject),
            cell(one.verdict, f"s {_TONES[one.verdict]}"),
            cell(one.there),
            cell(one.here),
            cell(one.why),
        )
        for one in report.compatibility
    )
    if not report.compatibility:
        return Html("")
    return table("Would this node take it?", ("", "verdict", "checkpoint", "here", "why"), rows)


def _origin(operation: Operation, held: Held) -> Html:
    report = held.report
    return facts(
        [
            *operation.made,
            ("reference", report.reference),
            ("digest", report.digest),
            ("checkpointed", report.checkpointed),
            ("container", " ".join(filter(None, (report.container["name"], report.container["id"][:12])))),
            ("pod", "/".join(filter(None, (report.pod["namespace"], report.pod["name"])))),
            ("host name in it", report.hostname),
            ("engine", report.engine),
            ("runtime", report.runtime),
            ("CRIU", report.criu),
            ("kernel", " ".join(filter(None, (report.host["arch"], report.host["kernel"])))),
            ("base image", report.base_image["name"]),
            ("base digest", report.base_image["digest"]),
            *((f"network {name}", " ".join(words)) for name, words in list(report.network.items())[:_ROWS]),
            ("NVIDIA driver", held.gpus.driver if held.gpus else report.gpu.get("driver", "")),
            ("cryoci, here", __version__),
        ]
    )


def _clamp(amount: int) -> int:
    return max(0, min(amount, _BYTES))
