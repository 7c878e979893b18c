# SPDX-License-Identifier: Apache-2.0
"""The YAML that CDI specifications are written in, and no more of YAML.

The runtime runs without site-packages, so PyYAML is not there; the tests compare this reader with it.
Read: block and flow mappings and sequences, plain and quoted scalars of one line, comments, one document.
Refused with the line: anchors, aliases, tags, directives, block scalars, scalars over several lines, tabs as
indentation, and keys that occur twice. A file that needs those can be given as JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_OCTAL = re.compile(r"[-+]?0o?([0-7]+)")
_HEX = re.compile(r"[-+]?0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_ESCAPES = {
    "0": "\0", "a": "\a", "b": "\b", "t": "\t", "\t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r",
    "e": "\x1b", " ": " ", '"': '"', "/": "/", "\\": "\\", "N": "\x85", "_": "\xa0", "L": "\u2028",
    "P": "\u2029",
}  # fmt: skip
_DEPTH = 40


class YamlError(ValueError):
    """The text is no YAML of this subset; the message begins with "line N: "."""


def load(text: str) -> Any:
    """The one document in `text`. Raises YamlError."""
    return _Reader(text).document()


class _Reader:
    """`lines` are (number, indentation, text) without blank lines and comments."""

    def __init__(self, text: str) -> None:
        self.lines: list[tuple[int, int, str]] = []
        self.at = 0
        begun = ended = False
        for number, raw in enumerate(re.split("\r\n|\n|\r", text.removeprefix("\ufeff")), 1):
            body = raw.lstrip(" ")
            if body.startswith("\t") and body.strip("\t \r") and not body.lstrip("\t ").startswith("#"):
                raise YamlError(f"line {number}: a tab in the indentation")
            body = _uncomment(body).rstrip(" \t")
            if not body:
                continue
            if raw.startswith("---") and (body == "---" or raw[3:4] in " \t"):
                if self.lines or begun or ended:
                    raise YamlError(f"line {number}: a second document")
                begun = True
                if body != "---":
                    raise YamlError(f"line {number}: begin the document on the line below ---")
                continue
            if raw.startswith("...") and body == "...":
                ended = True
                continue
            if ended:
                raise YamlError(f"line {number}: text after the end of the document")
            if raw.startswith("%"):
                raise YamlError(f"line {number}: directives are not read here")
            self.lines.append((number, len(raw) - len(raw.lstrip(" ")), body))

    def document(self) -> Any:
        if not self.lines:
            return None
        value = self.block(self.lines[0][1], 0)
        if self.at < len(self.lines):
            self.fail("this indentation fits nothing above")
        return value

    def fail(self, why: str, at: int | None = None) -> None:
        number = self.lines[min(self.at if at is None else at, len(self.lines) - 1)][0]
        raise YamlError(f"line {number}: {why}")

    def block(self, indent: int, depth: int) -> Any:
        """The node that begins at the current line, all of whose lines have at least `indent`."""
        if depth > _DEPTH:
            self.fail(f"nested more than {_DEPTH} deep")
        text = self.lines[self.at][2]
        if text == "-" or text.startswith("- "):
            return self.sequence(indent, depth)
        if _key(text) is not None:
            return self.mapping(indent, depth)
        self.at += 1
        return self.scalar(text, depth)

    def sequence(self, indent: int, depth: int) -> list[Any]:
        items: list[Any] = []
        while self.at < len(self.lines):
            number, column, text = self.lines[self.at]
            if column != indent or not (text == "-" or text.startswith("- ")):
                break
            rest = text[1:].lstrip(" ")
            if not rest:
                self.at += 1
                items.append(self.below(indent + 1, depth))
            elif rest == "-" or rest.startswith("- ") or _key(rest) is not None:
                inner = column + len(text) - len(rest)  # `- key: value`: a block that begins in this line
                self.lines[self.at] = (number, inner, rest)
                items.append(self.block(inner, depth + 1))
            else:
                self.at += 1
                items.append(self.scalar(rest, depth))
        if self.at < len(self.lines) and self.lines[self.at][1] > indent:
            self.fail("this indentation fits nothing above")
        return items

    def mapping(self, indent: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self.at < len(self.lines):
            _, column, text = self.lines[self.at]
            if column != indent or text == "-" or text.startswith("- "):
                break
            split = _key(text)
            if split is None:
                self.fail("expected `key: value`")
                break
            raw, rest = split
            key = self.scalar(raw, depth, move=0)
            if not isinstance(key, str):
                self.fail(f"the key {raw} is not a text; put it in quotes")
            if key in found:
                self.fail(f"the key {key!r} occurs twice")
            self.at += 1
            if rest:
                found[key] = self.scalar(rest, depth)
            elif self.at < len(self.lines) and self.lines[self.at][1] == indent:
                # a sequence may stand as far left as its key
                dash = self.lines[self.at][2] == "-" or self.lines[self.at][2].startswith("- ")
                found[key] = self.sequence(indent, depth + 1) if dash else None
            else:
                found[key] = self.below(indent + 1, depth)
        if self.at < len(self.lines) and self.lines[self.at][1] > indent:
            self.fail("this indentation fits nothing above (texts over several lines are not read here)")
        return found

    def below(self, least: int, depth: int) -> Any:
        """The node on the lines that follow, when they are indented by `least` or more; else null."""
        if self.at < len(self.lines) and self.lines[self.at][1] >= least:
            return self.block(self.lines[self.at][1], depth + 1)
        return None

    def scalar(self, text: str, depth: int, move: int = 1) -> Any:
        """A scalar or flow collection that is all of `text`, which began `move` lines above."""
        line = self.at - move
        try:
            value, end = _flow(text, 0, depth, top=True)
        except YamlError as e:
            self.fail(str(e), line)
        if text[end:].strip(" \t"):
            self.fail(f"unexpected {text[end:].strip()[:40]!r}", line)
        return value


def _uncomment(text: str) -> str:
    """`text` without its comment: a # at the start or after a blank, outside of quotes."""
    quote = ""
    flow = at = 0  # depth of brackets
    while at < len(text):
        letter = text[at]
        if quote:
            if letter == "\\" and quote == '"':
                at += 1
            elif letter == quote:
                quote = ""
        elif letter == "#" and (at == 0 or text[at - 1] in " \t"):
            return text[:at]
        elif letter in "'\"[{" and _begins(text[:at], flow):
            if letter in "'\"":
                quote = letter
            else:
                flow += 1
        elif letter in "]}" and flow:
            flow -= 1
        at += 1
    return text


def _begins(before: str, flow: int) -> bool:
    """May a value begin after `before`? Elsewhere quotes and brackets are letters of a plain scalar."""
    bare = before.rstrip(" \t")
    if not bare.strip("- \t"):
        return len(bare) < len(before) or not bare
    if bare[-1] == ":":
        return len(bare) < len(before) or bare[-2:-1] in ("'", '"')
    return flow > 0 and bare[-1] in "[{,"


def _key(text: str) -> tuple[str, str] | None:
    """(key, value) as written, when `text` is an entry of a block mapping."""
    if text[0] in "'\"":
        try:
            end = _quoted(text, 0)[1]
        except YamlError:
            return None
        rest = text[end:].lstrip(" ")
        return (
            (text[:end], rest[1:].strip(" \t")) if rest[:1] == ":" and rest[1:2] in ("", " ", "\t") else None
        )
    if text[0] in "[{":
        return None
    found = re.search(r":(?=[ \t]|$)", text)
    return (text[: found.start()].rstrip(" "), text[found.end() :].strip(" \t")) if found else None


def _quoted(text: str, at: int) -> tuple[str, int]:
    """The quoted scalar that begins at `at`, and where it ends."""
    quote, out, at = text[at], "", at + 1
    while at < len(text):
        letter = text[at]
        if letter == quote == "'" and text[at + 1 : at + 2] == "'":
            out, at = out + "'", at + 2
        elif letter == quote:
            return out, at + 1
        elif letter == "\\" and quote == '"':
            sign = text[at + 1 : at + 2]
            width = {"x": 2, "u": 4, "U": 8}.get(sign, 0)
            if width:
                digits = text[at + 2 : at + 2 + width]
                if not re.fullmatch(f"[0-9a-fA-F]{{{width}}}", digits) or int(digits, 16) > 0x10FFFF:
                    raise YamlError(f"a bad escape \\{sign}{digits}")
                out += chr(int(digits, 16))
            elif sign in _ESCAPES and sign:
                out += _ESCAPES[sign]
            else:
                raise YamlError(f"a bad escape \\{sign}")
            at += 2 + width
        else:
            out, at = out + letter, at + 1
    raise YamlError("a quote that does not end in its line (texts over several lines are not read here)")


def _flow(text: str, at: int, depth: int, *, top: bool = False) -> tuple[Any, int]:
    """The scalar or flow collection that begins at `at`, and where it ends; a plain one at `top` takes it all."""
    if depth > _DEPTH:
        raise YamlError(f"nested more than {_DEPTH} deep")
    first = text[at : at + 1]
    if first and first in "'\"":
        return _quoted(text, at)
    if first == "[":
        return _flow_sequence(text, at + 1, depth)
    if first == "{":
        return _flow_mapping(text, at + 1, depth)
    if first and first in "]},#":
        raise YamlError(f"unexpected {text[at : at + 20]!r}")
    if first and first in "&*!|>%@`":
        raise YamlError(f"{text[at : at + 20]!r}: anchors, tags and block texts are not read here")
    end = len(text)
    if not top:
        stop = re.compile(r"[\[\]{},]|:(?=[ \t,\]}]|$)").search(text, at)
        end = stop.start() if stop else end
    word = text[at:end].strip(" \t")
    if (word[:1] in ("?", "-") and word[1:2] in ("", " ")) or (top and re.search(r":([ \t]|$)", word)):
        raise YamlError(f"{word[:40]!r} is no value; put it in quotes")
    return _plain(word), end


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t"):
        at += 1
    if at >= len(text):
        raise YamlError("a bracket that does not close in its line")
    return at


def _flow_sequence(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    while text[at := _skip(text, at)] != "]":
        value, at = _flow(text, at, depth + 1)
        items.append(value)
        at = _skip(text, at)
        if text[at] == ",":
            at += 1
        elif text[at] != "]":
            raise YamlError(f"expected , or ] before {text[at : at + 20]!r}")
    return items, at + 1


def _flow_mapping(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while text[at := _skip(text, at)] != "}":
        key, at = _flow(text, at, depth + 1)
        at = _skip(text, at)
        if not isinstance(key, str) or text[at] != ":" or key in found:
            raise YamlError(f"expected a key of its own and : before {text[at : at + 20]!r}")
        at = _skip(text, at + 1)
        value, at = (None, at) if text[at] in ",}" else _flow(text, at, depth + 1)
        found[key] = value
        at = _skip(text, at)
        if text[at] == ",":
            at += 1
        elif text[at] != "}":
            raise YamlError(f"expected , or }} before {text[at : at + 20]!r}")
    return found, at + 1


def _plain(word: str) -> Any:
    """What an unquoted word is: number, truth, nothing or a text; 0644 is octal as in file modes."""
    if word.lower() in _WORDS and (word in _WORDS or word in (word.upper(), word.title())):
        return _WORDS[word.lower()]
    if _INT.fullmatch(word):
        return int(word)
    if _OCTAL.fullmatch(word):
        return int(word.replace("o", ""), 8)
    if _HEX.fullmatch(word):
        return int(word, 16)
    if _FLOAT.fullmatch(word):
        return float(word)
    return word


def parse(text: str) -> Any:
    """JSON if it looks like JSON, else YAML. Raises ValueError (YamlError is one)."""
    if text.lstrip()[:1] in ("{", "["):
        return json.loads(text)
    return load(text)
