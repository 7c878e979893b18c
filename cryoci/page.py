# SPDX-License-Identifier: Apache-2.0
"""The one template of every HTML page that cryoci writes: `--timeline`, `--report`.

A page is one file without scripts and without anything from elsewhere (its own policy forbids both), dark or
light as the reader's system is. Text comes out of images and is hostile: it gets in through `text` alone. `Html` is
markup that is safe to put together.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

from cryoci.amounts import printable

Html = NewType("Html", str)
MAX_TEXT = 400  # characters of one piece of foreign text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --text: #1c2024; --soft: #5b6470; --line: #d9dde3;
  --bar: #2f6db5; --call: #8a929e; --good: #1a7f4b; --warn: #9a5b00; --bad: #c0272d; --focus: #0b57d0;
  --c1: #2f6db5; --c2: #0e8f7e; --c3: #c9ced6; --c4: #a97bd1; --c5: #d9902f; --c6: #7d8590; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1c2026; --text: #e7eaee; --soft: #9fa9b6;
  --line: #353b45; --bar: #6ba6ea; --call: #77808d; --good: #57c98b; --warn: #e9b04f; --bad: #ff8078; --focus: #8ab8ff;
  --c1: #6ba6ea; --c2: #45c4b0; --c3: #3d444f; --c4: #c3a0e6; --c5: #e9b04f; --c6: #8b949f; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1120px; padding: 1.5rem 1rem 4rem;
  background: var(--back); color: var(--text); }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; } h3 { font-size: 1rem; margin: 1rem 0 .5rem; }
p { margin: .25rem 0 .75rem; } .soft, caption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; }
a { color: var(--focus); } :focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; border-radius: 3px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.25rem;
  margin: 1rem 0; }
section.bad { border: 2px solid var(--bad); } section.warn { border: 2px solid var(--warn); }
.chip { display: inline-block; border-radius: 1rem; padding: .1rem .7rem; font-size: .85rem; font-weight: 600;
  border: 2px solid currentColor; vertical-align: 2px; } .good { color: var(--good); }
.chip.warn, td.warn { color: var(--warn); } .chip.bad, td.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; }
.tile b { display: block; font-size: 1.3rem; line-height: 1.3; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding: .25rem 0; } th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } .n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.bars { width: 18%; min-width: 6rem; } td.s { white-space: nowrap; }
.scroll + .scroll, details + .scroll { margin-top: 1rem; } .wide svg { min-width: 760px; }
code, .mono, pre { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } li { overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .25rem 0; font-weight: 600; overflow-wrap: anywhere; }
.bar { display: flex; height: .8rem; margin: .35rem 0; border-radius: 3px; overflow: hidden; background: var(--line); }
.bar i { display: block; height: 100%; } .key { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px;
  margin-right: .4rem; vertical-align: -1px; } .keys span { margin-right: 1.2rem; white-space: nowrap; }
.c1 { background: var(--c1); } .c2 { background: var(--c2); } .c3 { background: var(--c3); }
.c4 { background: var(--c4); } .c5 { background: var(--c5); } .c6 { background: var(--c6); }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; display: block; } svg text { fill: currentColor; }
.tick { stroke: var(--line); } .span { fill: var(--bar); } .call { fill: var(--call); }
@media print { section, .tile { break-inside: avoid; } nav { display: none; } }
"""


def text(value: object, limit: int = MAX_TEXT) -> Html:
    """Foreign text as markup: escaped, without control characters, at most `limit` characters."""
    whole = str(value)
    shown = whole if len(whole) <= limit else whole[: limit - 1] + "\u2026"
    return Html(html.escape(printable(shown)))


def join(parts: Iterable[Html], between: str = "") -> Html:
    """Markup one after another, with a text between."""
    return Html(text(between).join(parts))


def document(title: str, body: Html) -> str:
    """The whole page."""
    name = text(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


@dataclass(frozen=True)
class Section:
    """A part of a page; `name` is its anchor, made of letters; `tone` "", "warn" or "bad"."""

    name: str
    title: str
    body: Html
    tone: str = ""

    def html(self) -> Html:
        return Html(
            f'<section id="{self.name}" class="{self.tone}" aria-labelledby="{self.name}-title">'
            f'<h2 id="{self.name}-title">{text(self.title)}</h2>{self.body}</section>\n'
        )


def contents(sections: Sequence[Section]) -> Html:
    """Links to the sections, the first thing that the Tab key reaches."""
    links = join(Html(f'<a href="#{one.name}">{text(one.title)}</a>') for one in sections)
    return Html(f'<nav aria-label="contents">{links}</nav>')


def heading(title: str, chip: str, tone: str, below: str) -> Html:
    """The page's title, with how it went in a word; `tone` "good", "warn" or "bad"."""
    mark = f' <span class="chip {tone}">{text(chip)}</span>' if chip else ""
    return Html(f'<header><h1>{text(title)}{mark}</h1><p class="soft">{text(below)}</p></header>')


def paragraph(words: str, *, soft: bool = False) -> Html:
    """One paragraph."""
    return Html(f'<p class="soft">{text(words)}</p>' if soft else f"<p>{text(words)}</p>")


def tiles(pairs: Iterable[tuple[str, str]]) -> Html:
    """The numbers that count most; empty ones are left out."""
    made = (Html(f'<div class="tile"><b>{text(v)}</b>{text(k)}</div>') for k, v in pairs if v)
    return Html(f'<div class="tiles">{join(made)}</div>')


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and values; empty ones are left out."""
    made = (Html(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>") for k, v in pairs if v)
    return Html(f"<dl>{join(made)}</dl>")


def bullets(lines: Iterable[str]) -> Html:
    """A list of texts."""
    return Html(f"<ul>{join(Html(f'<li>{text(line)}</li>') for line in lines)}</ul>")


def cell(value: object, tone: str = "") -> Html:
    """A table's cell; `tone` is a class: "n" for numbers, "s" for words that stay whole, "mono", "good", "bad"."""
    return Html(f'<td class="{tone}">{text(value)}</td>' if tone else f"<td>{text(value)}</td>")


def bar_cell(parts: Sequence[tuple[int, int]], whole: int) -> Html:
    """A cell with a `bar`."""
    return Html(f'<td class="bars">{bar(parts, whole)}</td>')


def table(
    caption: str, head: Sequence[str], rows: Iterable[Iterable[Html]], numbers: Sequence[str] = ()
) -> Html:
    """A table that scrolls by itself where it is too wide; `numbers` are the columns set to the right."""
    names = join(
        Html(f'<th scope="col"{" class=n" if one in numbers else ""}>{text(one)}</th>') for one in head
    )
    body = join(Html(f"<tr>{join(row)}</tr>\n") for row in rows)
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def wide(label: str, body: Html) -> Html:
    """A drawing that scrolls by itself where there is too little room for it."""
    return Html(
        f'<div class="scroll wide" tabindex="0" role="region" aria-label="{text(label)}">{body}</div>'
    )


def bar(parts: Sequence[tuple[int, int]], whole: int) -> Html:
    """A bar `whole` wide of (color 1 to 6, amount); its numbers stand beside it, so readers of screens skip it."""
    widths = [(color, 100 * amount / whole) for color, amount in parts if amount > 0 and whole > 0]
    inner = join(Html(f'<i class="c{color}" style="width:{width:.2f}%"></i>') for color, width in widths)
    return Html(f'<div class="bar" aria-hidden="true">{inner}</div>')


def keys(names: Sequence[tuple[int, str]]) -> Html:
    """What the colors mean."""
    made = join(Html(f'<span><i class="key c{color}"></i>{text(name)}</span>') for color, name in names)
    return Html(f'<p class="keys soft">{made}</p>')


def fold(summary: Html, body: Html, *, open: bool = False) -> Html:
    """Something to unfold, by mouse or Enter."""
    return Html(f"<details{' open' if open else ''}><summary>{summary}</summary>{body}</details>\n")
