# SPDX-License-Identifier: Apache-2.0
"""HTML pages under test: held to the letter by a parser, and shown to a real browser where there is one."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})
LOADING = frozenset({"src", "srcset", "action", "data", "poster", "background", "xlink:href", "formaction"})


class Page(HTMLParser):
    """A page's elements; `problems` are tags that do not close, or close what is not open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.words: list[str] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.problems.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:]}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All that a reader sees, with the style sheet."""
        return "".join(self.words)

    def values(self, name: str) -> list[str]:
        """The values of an attribute, in order."""
        return [value for _, known, value in self.attributes if known == name]


def check(source: str) -> Page:
    """Assert what holds for every page of cryoci's: well formed, alone, without scripts, usable by keyboard."""
    page = Page(source)
    assert page.problems == []
    assert source.startswith("<!DOCTYPE html>") and page.tags[0] == "html"
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name not in LOADING, (tag, name)
        assert name != "href" or value.startswith("#"), value
        assert name != "style" or "url" not in value, value
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.values("href")} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert page.tags.count("details") == page.tags.count("summary")
    assert page.tags.count("svg") == page.values("role").count("img")
    scrolls = sum("scroll" in value.split() for value in page.values("class"))
    assert page.values("tabindex").count("0") == scrolls  # what scrolls can be reached and scrolled by keys
    return page


def browser() -> str | None:
    """A Chromium of this host, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A headless Chromium with a profile in `place`; each call is one run of it."""

    def __init__(self, program: str, place: Path) -> None:
        self._place = place
        self._argv = [
            program,
            "--headless",
            "--no-sandbox",  # tests run as root
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            f"--user-data-dir={place / 'profile'}",
        ]

    def dom(self, page: Path) -> tuple[str, str]:
        """The document as the browser understood it, and its log of what it did on the network."""
        log = self._place / "net.json"
        done = self._run(f"--log-net-log={log}", "--dump-dom", page.as_uri())
        return done.stdout.decode(), log.read_text()

    def picture(self, page: Path, scheme: Literal["dark", "light"]) -> Path:
        """A PNG of the page's top in a reader's colors."""
        target = self._place / f"{page.stem}-{scheme}.png"
        wish = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
        self._run(wish, "--window-size=1180,900", f"--screenshot={target}", page.as_uri())
        return target

    def _run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*self._argv, *words], capture_output=True, check=True, timeout=120)


def first_pixel(png: Path) -> tuple[int, ...]:
    """Red, green and blue of the upper left pixel, which no PNG filter changes."""
    raw = png.read_bytes()
    at, data = 8, b""
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "big")
        if raw[at + 4 : at + 8] == b"IDAT":
            data += raw[at + 8 : at + 8 + length]
        at += 12 + length
    return tuple(zlib.decompress(data)[1:4])
