# SPDX-License-Identifier: Apache-2.0
"""Which processes of a checkpoint were stopped by a signal when it was made (criu/images/core.proto).

IMAGE ::= COMMON_MAGIC CORE_MAGIC SIZE MESSAGE       little endian u32, protobuf
core_entry ::= ... 3: task_core_entry ...            task_core_entry ::= 1: task_state ...
"""

from __future__ import annotations

import os
import re

from cryoci.errors import ImageError
from cryoci.protobuf import Message
from cryoci.shim.criu import images

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
            except ImageError:
                continue
    return found


def _state(data: bytes) -> int:
    return Message(next(images.messages(data), b"")).message(_TASK).number(_STATE)
