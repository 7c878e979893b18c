# SPDX-License-Identifier: Apache-2.0
"""Spans of an operation, and the timeline that is made of them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cryoci import picture, timeline, trace
from cryoci.errors import UnsupportedError, UsageError


def line(name: str, start: float, seconds: float, **more: object) -> str:
    return json.dumps({"event": "span", "name": name, "start": start, "seconds": seconds, **more}) + "\n"


class Page(HTMLParser):
    """Tags and attributes of a page, for tests."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_steps_during_others_are_deeper() -> None:
    events = line("dump", 10, 5) + line("capture", 11, 2, bytes=4_000_000_000) + line("store", 15.5, 1)
    found = timeline.steps(events, 10)
    assert [(step.name, step.start, step.depth) for step in found] == [
        ("dump", 0, 0), ("capture", 1, 1), ("store", 5.5, 0),
    ]  # fmt: skip
    assert found[1].rate == "4,000 MB, 2.0 GB/s"


def test_what_was_chosen_is_shown(tmp_path: Path) -> None:
    (step,) = timeline.steps(line("memory: capture", 1, 1, chosen="write direct: <1.9> GB/s"), 0)
    assert step.chosen == "write direct: <1.9> GB/s"
    assert "(write direct: &lt;1.9&gt; GB/s)</title>" in timeline.svg([step], 2)


def test_a_line_that_was_cut_off_is_left_out() -> None:
    events = line("dump", 1, 1) + '{"event": "span", "na' + "\n" + line("stop", 2, 1)
    assert [step.name for step in timeline.steps(events, 0)] == ["dump", "stop"]


def test_processes_of_the_operation_write_to_one_timeline(tmp_path: Path) -> None:
    target = tmp_path / "t.json"
    with timeline.recording(str(target), "cryoci test"), trace.span("outer", bytes=7):
        program = "from cryoci import trace\nwith trace.span('inner'): pass"
        subprocess.run([sys.executable, "-c", program], check=True)
    value = json.loads(target.read_text())
    assert value["version"] == 1 and value["title"] == "cryoci test"
    assert [(step["name"], step["depth"]) for step in value["steps"]] == [("outer", 0), ("inner", 1)]
    assert 0 <= value["steps"][0]["start"] <= value["steps"][1]["start"] <= value["seconds"]
    assert trace.TIMELINE not in os.environ


def test_a_failed_operation_has_its_timeline_too(tmp_path: Path) -> None:
    target = tmp_path / "t.json"
    with pytest.raises(ValueError, match="broken"), timeline.recording(str(target), "x"), trace.span("dump"):
        raise ValueError("broken")
    assert [step["name"] for step in json.loads(target.read_text())["steps"]] == ["dump"]


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    target = tmp_path / "t.html"
    hostile = '"><script>alert(1)</script><img src=http://x.example/>'
    with timeline.recording(str(target), hostile), trace.span(hostile), trace.call(["/bin/x", hostile]):
        pass
    page = Page(target.read_text())
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.tags.count("rect") == 2


def test_other_names_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    ran = []
    with pytest.raises(UsageError, match=r"none of \.json, \.html, \.png"):
        with timeline.recording(str(tmp_path / "t.jpg"), "x"):
            ran.append(1)
    assert not ran


def test_a_picture_shows_each_step_where_and_as_long_as_the_page_does(tmp_path: Path) -> None:
    from PIL import Image

    hostile = "x\x1b[31m" + "\u202e" * 500 + "w" * 5000
    events = (
        line("dump", 0, 4) + line("memory: capture", 1, 2, bytes=4_000_000_000) + line(hostile, 3.5, 0.25)
    )
    found = timeline.steps(events, 0)
    path = tmp_path / "t.png"
    path.write_bytes(picture.png("cryoci checkpoint " + hostile, found, 4))
    image = Image.open(path).convert("RGB")
    zoom = image.width // timeline.WIDTH
    assert image.size == (zoom * timeline.WIDTH, zoom * (picture._HEAD + 4 * timeline.ROW + 10))
    scale = (timeline.WIDTH - timeline.LEFT - timeline.RIGHT) / 4
    blue = (0x2F, 0x6D, 0xB5)
    for row, step in enumerate(found, 1):
        y = zoom * (picture._HEAD + row * timeline.ROW + 10)
        bar = [x for x in range(image.width) if image.getpixel((x, y)) == blue]
        assert min(bar) == pytest.approx(zoom * (timeline.LEFT + step.start * scale), abs=zoom)
        assert max(bar) == pytest.approx(
            zoom * (timeline.LEFT + (step.start + step.seconds) * scale), abs=zoom
        )
        name = [image.getpixel((x, y)) for x in range(zoom * (timeline.LEFT - 4))]
        assert any(one != (0xFB, 0xFB, 0xFA) for one in name)


def test_a_picture_of_very_much_stays_small() -> None:
    events = "".join(line(f"step {n}", n, 1) for n in range(1000))
    from PIL import Image

    image = Image.open(io.BytesIO(picture.png("x", timeline.steps(events, 0), 1000)))
    assert image.size == (timeline.WIDTH, picture._HEAD + 401 * timeline.ROW + 10)


def test_without_pillow_it_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    ran = []
    with pytest.raises(UnsupportedError, match="Pillow") as caught:
        with timeline.recording(str(tmp_path / "t.png"), "x"):
            ran.append(1)
    assert "python3-pil" in str(caught.value.hint) and not ran
    monkeypatch.undo()
    with timeline.recording(str(tmp_path / "t.png"), "x"), trace.span("dump"):
        pass
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
