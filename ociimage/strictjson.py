# SPDX-License-Identifier: Apache-2.0
"""JSON from strangers: bounded in size and depth, no duplicate keys, no NaN.

A duplicate key lets two readers see two documents under one digest; nesting can exhaust the stack.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from cryoci.errors import ImageError

MAX_DEPTH = 64
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKETS = re.compile(rb"[\[\]{}]")


def loads(data: bytes, what: str, *, limit: int) -> Any:
    """Parse `data`, at most `limit` bytes; `what` names it in messages. Raises ImageError."""
    if len(data) > limit:
        raise ImageError(f"{what} is {len(data)} bytes; at most {limit} are accepted")
    depth = 0
    for bracket in _BRACKETS.finditer(_STRINGS.sub(b"", data)):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ImageError(f"{what} is JSON nested deeper than {MAX_DEPTH} levels")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
        if b"\\ud" in data or b"\\uD" in data:  # half a pair is no text: it could not be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{what} is not valid JSON: {e}") from e


def load_object(data: bytes, what: str, *, limit: int) -> dict[str, Any]:
    """As `loads`, and the document must be an object."""
    value = loads(data, what, limit=limit)
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
