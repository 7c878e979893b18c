# SPDX-License-Identifier: Apache-2.0
"""Which processes of a checkpoint were stopped by a signal when it was made (criu/images/core.proto).

IMAGE ::= COMMON_MAGIC CORE_MAGIC SIZE MESSAGE       little endian u32, protobuf
core_entry ::= ... 3: task_core_entry ...            task_core_entry ::= 1: task_state ...
"""

from __future__ import annotations

import os
import re

_COMMON = 0x54564319
_TASK, _STATE, _STOPPED = 3, 1, 3  # fields tc and task_state; TASK_STOPPED (criu/include/pid.h)
_NAME = re.compile(r"core-(\d+)\.img\Z")
_LIMIT = 16 << 20  # bytes of one image, and more than CRIU writes of any process


def stopped(directory: str | os.PathLike[str]) -> set[int]:
    """Process ids, as the container counts them. What cannot be read counts as running: CRIU has restored it."""
    found = set()
    for name in os.listdir(directory):
        if match := _NAME.match(name):
            with open(os.path.join(directory, name), "rb") as f:
                data = f.read(_LIMIT)
            try:
                if _state(data) == _STOPPED:
                    found.add(int(match[1]))
            except (IndexError, KeyError):
                continue
    return found


def _state(data: bytes) -> int:
    if int.from_bytes(data[:4], "little") != _COMMON:
        raise KeyError("magic")
    size = int.from_bytes(data[8:12], "little")
    task = field(data[12 : 12 + size], _TASK)
    state = field(task, _STATE) if isinstance(task, bytes) else 0
    return state if isinstance(state, int) else 0


def field(message: bytes, wanted: int) -> int | bytes:
    """The first field `wanted` of a protobuf message. Raises KeyError without, IndexError when it is cut off."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + size], "little"), at + size
        else:
            raise KeyError(kind)
        if key >> 3 == wanted:
            return value
    raise KeyError(wanted)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError(at)
