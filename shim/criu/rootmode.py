# SPDX-License-Identifier: Apache-2.0
"""The mode of the root directory: CRIU wants the one of the dump, and each engine makes its own.

podman and CRI-O make it 0555 over an image that does not say, containerd 0755, and whoever restores cannot choose it.
Only where the two differ is CRIU told not to compare modes: `skip-file-rwx-check` stands for all files.

    fs-PID.img  fs_entry ::= ... 2: root_id               little endian u32 sizes, protobuf
    files.img   file_entry ::= ... 2: id  3: reg_file_entry ::= ... 10: mode
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

from cryoci.errors import ImageError
from cryoci.protobuf import Message
from cryoci.shim import paths
from cryoci.shim.bundle import LIMIT
from cryoci.shim.criu import images

SKIP = "skip-file-rwx-check"
_FS = re.compile(r"fs-(\d+)\.img\Z")
_ROOT_ID, _ID, _REG, _MODE = 2, 2, 3, 10
_IMAGE = 256 << 20  # bytes of an image that is read as a whole


def lines(directory: str, spec: str) -> str:
    """For CRIU's configuration: SKIP when the root of the bundle with config.json `spec` has another mode, else "".

    What cannot be read says nothing: CRIU reads the same images next, and the runtime the same bundle.
    """
    try:
        value = json.loads(paths.read(spec, LIMIT) or b"")
        here = os.stat(os.path.join(os.path.dirname(spec), value["root"]["path"])).st_mode
        there = dumped(directory)
    except (OSError, ImageError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f"{SKIP}\n" if there is not None and (there ^ here) & 0o777 else ""


def dumped(directory: str) -> int | None:
    """Mode of the root directory of the container's first process at the dump, if the images tell.

    Raises OSError; ImageError for images that are damaged.
    """
    first = min((int(m[1]) for name in os.listdir(directory) if (m := _FS.match(name))), default=None)
    if first is None:
        return None
    root_id = next(_messages(f"{directory}/fs-{first}.img"), Message(b"")).number(_ROOT_ID, -1)
    for entry in _messages(f"{directory}/files.img"):
        if entry.number(_ID) == root_id:
            mode = entry.message(_REG).number(_MODE, -1)
            return mode if mode >= 0 else None
    return None


def _messages(path: str) -> Iterator[Message]:
    with open(path, "rb") as f:
        return map(Message, images.messages(f.read(_IMAGE)))
