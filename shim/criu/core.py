# SPDX-License-Identifier: Apache-2.0
"""CRIU's image of a thread: which processes were stopped by a signal, and where a thread goes on (images/core.proto).

IMAGE ::= COMMON_MAGIC CORE_MAGIC SIZE MESSAGE       little endian u32, protobuf
core_entry ::= ... 2: thread_info_x86 ... 3: task_core_entry ...
thread_info_x86 ::= ... 2: user_x86_regs_entry ...   user_x86_regs_entry ::= 1: r15 ... 27: gs, as in user_regs_struct
task_core_entry ::= 1: task_state ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from cryoci import protobuf
from cryoci.errors import ImageError
from cryoci.protobuf import Message
from cryoci.shim.criu import images

_TASK, _STATE, _STOPPED = 3, 1, 3  # fields tc and task_state; TASK_STOPPED (criu/include/pid.h)
_INFO, _REGISTERS, _COUNT = 2, 2, 27
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


def set_registers(directory: str, thread: int, registers: Sequence[int]) -> None:
    """Have a thread go on with `registers` (struct user_regs_struct of x86-64). Raises OSError, ImageError."""
    path = os.path.join(directory, f"core-{thread}.img")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as f:
        data = f.read(_LIMIT)
    message = data[12:]  # past two magics and the size
    if int.from_bytes(data[8:12], "little") != len(message):
        raise ImageError(f"{os.path.basename(path)} of the checkpoint is damaged")
    old = Message(message).message(_INFO).data(_REGISTERS)
    kept = [
        (number, value)
        for number, value, _ in protobuf.spans(old)
        if number > _COUNT and isinstance(value, int)
    ]
    new = b"".join(protobuf.number_field(*one) for one in (*enumerate(registers, 1), *kept))
    message = protobuf.replaced(message, (_INFO, _REGISTERS), new)
    new_path = path + ".new"
    with open(new_path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as f:
        f.write(data[:8] + len(message).to_bytes(4, "little") + message)
    os.replace(new_path, path)  # not synced, as CRIU's own images are not: there may be thousands of threads


def _state(data: bytes) -> int:
    return Message(next(images.messages(data), b"")).message(_TASK).number(_STATE)
