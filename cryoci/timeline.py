# SPDX-License-Identifier: Apache-2.0
"""Where the seconds and bytes of one operation went: `--timeline FILE.json|FILE.html|FILE.png`.

Every process of the operation appends its spans and calls (cryoci/trace.py) to one scratch file; at the end they
become JSON, one HTML page without scripts and without anything from elsewhere, or a picture (cryoci/picture.py).
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cryoci import page as template
from cryoci import picture
from cryoci.errors import UsageError
from cryoci.files import write_atomic
from cryoci.page import Html
from cryoci.trace import TIMELINE

WIDTH, LEFT, RIGHT, ROW = 1000, 300, 190, 22  # pixels of the drawing, its names, its last numbers, a row
_MOST = 400  # rows of the drawing
_FORMS = (".json", ".html", ".png")


@dataclass(frozen=True)
class Step:
    """One step. `start` in seconds from the operation's start; `bytes` it moved, if it moved any; `chosen`: how, and
    why so."""

    name: str
    kind: str  # "span": cryoci's own; "call": a program
    start: float
    seconds: float
    depth: int
    bytes: int | None = None
    chosen: str = ""

    @property
    def rate(self) -> str:
        """Its bytes and GB/s for people, or nothing."""
        if not self.bytes:
            return ""
        speed = f", {self.bytes / self.seconds / 1e9:.1f} GB/s" if self.seconds > 0.001 else ""
        return f"{self.bytes / 1e6:,.0f} MB{speed}"

    @property
    def said(self) -> str:
        """What stands beside its bar."""
        return f"{self.seconds:.3f} s" + (f", {self.rate}" if self.rate else "")


@dataclass
class Recorded:
    """What was recorded, in `seconds` in all; empty until the block has ended."""

    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def recording(target: str | None, title: str, *, keep: bool = False) -> Iterator[Recorded]:
    """Record the with block, and write the timeline to `target`, also when the block fails.

    None and not `keep`: record nothing. Raises UsageError (before the block) for a name that ends in none of .json,
    .html and .png, UnsupportedError (before the block) for a picture that cannot be drawn here, OSError.
    """
    made = Recorded()
    if target is None and not keep:
        yield made
        return
    path = Path(target) if target is not None else None
    if path is not None and path.suffix not in _FORMS:
        raise UsageError(
            f"--timeline {target}: none of {', '.join(_FORMS)}",
            hint="name it FILE.json, FILE.html or FILE.png",
        )
    if path is not None and path.suffix == ".png":
        picture.check()
    fd, scratch = tempfile.mkstemp(prefix="cryoci-timeline.")
    os.close(fd)
    before = os.environ.get(TIMELINE)
    os.environ[TIMELINE] = scratch
    start = time.monotonic()
    try:
        yield made
    finally:
        made.seconds = time.monotonic() - start
        if before is None:
            del os.environ[TIMELINE]
        else:
            os.environ[TIMELINE] = before
        made.steps = steps(Path(scratch).read_text(), start)
        os.unlink(scratch)
        if path is not None:
            write_atomic(path, _form(path.suffix, title, made), mode=0o644)


def steps(events: str, origin: float) -> list[Step]:
    """The spans and calls in `events` (JSON lines), in order; what happens during another is one deeper."""
    found = []
    for line in events.splitlines():
        try:
            value = json.loads(line)
            start, seconds = float(value["start"]) - origin, float(value["seconds"])
            if value["event"] == "span":
                name = str(value["name"])
            else:
                argv = [str(word) for word in value["argv"]]
                name = shlex.join([os.path.basename(argv[0]), *argv[1:]])
            amount = value.get("bytes")
            chosen = str(value.get("chosen") or "")
            found.append((start, -seconds, name, value["event"], int(amount) if amount else None, chosen))
        except (ValueError, KeyError, TypeError, IndexError):
            continue  # a line that was cut off with its writer
    result: list[Step] = []
    open_until: list[float] = []
    for start, negative, name, kind, amount, chosen in sorted(found, key=lambda one: one[:2]):
        end = start - negative
        while open_until and open_until[-1] < end - 1e-6:
            open_until.pop()
        result.append(Step(name, kind, start, -negative, len(open_until), amount, chosen))
        open_until.append(end)
    return result


def drawn(found: Sequence[Step]) -> list[Step]:
    """The steps that a drawing has; the longest, where there are too many."""
    longest = sorted(range(len(found)), key=lambda i: -found[i].seconds)[:_MOST]
    return [found[i] for i in sorted(longest)]


def sentence(found: Sequence[Step], total: float) -> str:
    """What a drawing shows."""
    left = max(0, len(found) - _MOST)
    more = f" The {left} shortest are not drawn." if left else ""
    return (
        f"{total:.2f} s in all. Strong bars are cryoci\u2019s steps, grey ones programs that it ran; "
        f"what is indented happened during the step above it.{more}"
    )


def svg(found: Sequence[Step], total: float) -> Html:
    """The steps as bars over time, `total` seconds wide."""
    shown = drawn(found)
    scale = (WIDTH - LEFT - RIGHT) / max(total, 1e-9)
    height = (len(shown) + 1) * ROW + 10
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="steps over time">']
    for part in range(5):
        x = LEFT + part * total / 4 * scale
        parts.append(f'<line class="tick" x1="{x:.1f}" y1="{ROW}" x2="{x:.1f}" y2="{height}"/>')
        parts.append(f'<text x="{x:.1f}" y="14" text-anchor="middle">{part * total / 4:.2f} s</text>')
    for row, step in enumerate(shown, 1):
        y = row * ROW
        depth = min(step.depth, 6)
        x, width = LEFT + step.start * scale, max(step.seconds * scale, 1)
        said = step.said
        title = f"{step.name}: {said}" + (f" ({step.chosen})" if step.chosen else "")
        parts.append(
            f"<g><title>{template.text(title)}</title>"
            f'<text x="{12 * depth}" y="{y + 14}">{template.text(step.name, 44 - 2 * depth)}</text>'
            f'<rect class="{"call" if step.kind == "call" else "span"}" x="{x:.1f}" y="{y + 3}" '
            f'width="{width:.1f}" height="{ROW - 7}" rx="2"/>'
            f'<text x="{min(x + width + 5, WIDTH - RIGHT + 5):.1f}" y="{y + 14}">{template.text(said)}</text></g>\n'
        )
    return Html("".join([*parts, "</svg>"]))


def explained(found: Sequence[Step], total: float) -> Html:
    """What the drawing shows, and the drawing."""
    return Html(template.paragraph(sentence(found, total)) + template.wide("timeline", svg(found, total)))


def page(title: str, found: Sequence[Step], total: float) -> str:
    """One self-contained page of the timeline alone."""
    return template.document(title, Html(f"<h1>{template.text(title)}</h1>{explained(found, total)}"))


def _form(suffix: str, title: str, made: Recorded) -> bytes | str:
    if suffix == ".png":
        return picture.png(title, made.steps, made.seconds)
    return (page if suffix == ".html" else _json)(title, made.steps, made.seconds)


def _json(title: str, found: Sequence[Step], total: float) -> str:
    value = {"version": 1, "title": title, "seconds": total, "steps": [asdict(step) for step in found]}
    return json.dumps(value, indent=1) + "\n"
