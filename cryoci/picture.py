# SPDX-License-Identifier: Apache-2.0
"""A timeline as a PNG: what the page draws, for places that show no pages. Drawn with Pillow, which is optional."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cryoci.amounts import printable
from cryoci.errors import UnsupportedError

if TYPE_CHECKING:
    from cryoci.timeline import Step

_HEAD = 52  # pixels above the drawing: title and sentence
_SIZE = 12  # of letters
_SHARP = 150  # rows up to which a pixel of the page is two here, so that the picture stays small enough
_BACK, _TEXT, _SOFT, _LINE = "#fbfbfa", "#1c2024", "#5b6470", "#d9dde3"  # as in page.py, in light
_BARS = {"span": "#2f6db5", "call": "#8a929e"}


def check() -> None:
    """Raise UnsupportedError unless pictures can be drawn."""
    try:
        from PIL import Image, ImageDraw, ImageFont  # noqa: F401
    except ImportError as e:
        raise UnsupportedError(
            f"a PNG is drawn with Pillow, which cannot be used here: {e}",
            hint="install it (Debian: python3-pil; pip install 'cryoci[png]'), or name the timeline FILE.html",
        ) from e


def png(title: str, found: Sequence[Step], total: float) -> bytes:
    """The picture of `found` over `total` seconds. Raises UnsupportedError, as `check` does."""
    check()
    from PIL import Image, ImageDraw, ImageFont

    from cryoci.timeline import LEFT, RIGHT, ROW, WIDTH, drawn, sentence

    shown = drawn(found)
    zoom = 2 if len(shown) <= _SHARP else 1
    height = _HEAD + (len(shown) + 1) * ROW + 10
    image = Image.new("RGB", (WIDTH * zoom, height * zoom), _BACK)
    draw = ImageDraw.Draw(image)
    plain, large = (ImageFont.load_default(size * zoom) for size in (_SIZE, _SIZE + 4))

    def write(
        x: float,
        y: float,
        text: str,
        room: float,
        fill: str = _TEXT,
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont = plain,
    ) -> float:
        """Text from `x` on, cut to `room` pixels; returns its width."""
        said = printable(text)[:400]
        wide = draw.textlength(said, font=font) / zoom
        while wide > room and said:
            said = (
                said[: max(0, min(len(said) - 2, int(len(said) * room / wide)))].rstrip("\u2026") + "\u2026"
            )
            wide = draw.textlength(said, font=font) / zoom
            if said == "\u2026":
                break
        draw.text((x * zoom, y * zoom), said, fill=fill, font=font)
        return float(wide)

    write(8, 6, title, WIDTH - 16, font=large)
    write(8, 30, sentence(found, total), WIDTH - 16, _SOFT)
    scale = (WIDTH - LEFT - RIGHT) / max(total, 1e-9)
    for part in range(5):
        x = LEFT + part * total / 4 * scale
        draw.line([x * zoom, (_HEAD + ROW) * zoom, x * zoom, height * zoom], fill=_LINE, width=zoom)
        text = f"{part * total / 4:.2f} s"
        write(x - draw.textlength(text, font=plain) / zoom / 2, _HEAD + 3, text, 100, _SOFT)
    for row, step in enumerate(shown, 1):
        y = _HEAD + row * ROW
        x, width = LEFT + step.start * scale, max(step.seconds * scale, 1)
        indent = 8 + 12 * min(step.depth, 6)
        write(indent, y + 3, step.name, LEFT - indent - 8)
        box = [x * zoom, (y + 3) * zoom, (x + width) * zoom, (y + ROW - 4) * zoom]
        draw.rectangle(box, fill=_BARS["call" if step.kind == "call" else "span"])
        at = min(x + width + 5, WIDTH - RIGHT + 5)
        write(at, y + 3, step.said, WIDTH - at - 4)
    target = io.BytesIO()
    image.save(target, "PNG", optimize=True)
    return target.getvalue()
