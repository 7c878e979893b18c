# SPDX-License-Identifier: Apache-2.0
"""What keeps a plain CRIU from restoring images without their memory, and says why.

- The inventory asks for a plugin that no node has, whose name is the message ("Missing required plugin: memory
  of cryoci ..."). CRIU since 4.1 looks for it early, where there is a directory of plugins.
- files.img, which a restore reads next, is a text that explains itself ("magic doesn't match for files.img");
  CRIU's own is beside it.
- Were both taken away, the processes would be restored as they were dumped: stopped.

cryoci restores from a view of the directory, where both are as CRIU wrote them.

    IMAGE   ::= INVENTORY_MAGIC SIZE MESSAGE                  little endian u32, protobuf (inventory.proto)
    MESSAGE ::= ... 12: plugins_entry { 12: plugin ... } ...  a later one adds to an earlier one
"""

from __future__ import annotations

import os
import shutil

from cryoci.errors import ImageError
from cryoci.files import sync_directory, write_atomic

INVENTORY, FILES, FILES_KEPT = "inventory.img", "files.img", "cryoci-files.img"
EXPLANATION = """\
The memory of this checkpoint lies in files of cryoci (cryoci-memory-*.img), which CRIU does not know.
Restore it through cryoci-runtime or with `cryoci restore`, or make it whole for CRIU alone:
cryoci materialize DIRECTORY
"""
PLUGIN = b"memory of cryoci (restore with cryoci, or first run `cryoci materialize` on the checkpoint)"
_MAGIC = 0x58313116
_FIELD = 12 << 3 | 2
_GUARD = bytes([_FIELD, len(PLUGIN) + 2, _FIELD, len(PLUGIN)]) + PLUGIN
_LIMIT = 16 << 20


def arm(directory: str) -> None:
    """Put the guard on the images in `directory`, if it is not there. Raises OSError, ImageError."""
    message = _read(directory)
    if not message.endswith(_GUARD):
        write_atomic(f"{directory}/{INVENTORY}", _image(message + _GUARD))
    if not os.path.lexists(f"{directory}/{FILES_KEPT}"):
        os.rename(f"{directory}/{FILES}", f"{directory}/{FILES_KEPT}")
    write_atomic(f"{directory}/{FILES}", EXPLANATION)


def armed(directory: str) -> bool:
    """Whether the guard is on: the dump was brought to its end. Raises OSError, ImageError."""
    return _read(directory).endswith(_GUARD)


def disarm(directory: str) -> None:
    """Take the guard off: the images hold all of their memory. Raises OSError, ImageError."""
    write_atomic(f"{directory}/{INVENTORY}", _image(_plain(directory)))
    if os.path.lexists(f"{directory}/{FILES_KEPT}"):
        os.rename(f"{directory}/{FILES_KEPT}", f"{directory}/{FILES}")
    sync_directory(directory)


def view(directory: str, where: str) -> None:
    """Make `where` a directory that shows the images in `directory` as CRIU wrote them: links to them,
    and an inventory without the guard. Raises OSError, ImageError.
    """
    inventory = _image(_plain(directory))
    remove_view(where)
    os.mkdir(where, 0o700)
    real = os.path.realpath(directory)
    # relative: CRIU follows them from inside of the container's mount namespace, too
    way = os.path.relpath(real, os.path.realpath(where))
    kept = os.path.lexists(f"{real}/{FILES_KEPT}")
    for name in os.listdir(real):
        if name not in (INVENTORY, FILES_KEPT):
            source = FILES_KEPT if name == FILES and kept else name
            os.symlink(f"{way}/{source}", f"{where}/{name}")
    write_atomic(f"{where}/{INVENTORY}", inventory)


def remove_view(where: str) -> None:
    """Remove what `view` has made. Never raises."""
    shutil.rmtree(where, ignore_errors=True)


def _plain(directory: str) -> bytes:
    return _read(directory).removesuffix(_GUARD)


def _read(directory: str) -> bytes:
    """The message of the inventory."""
    fd = os.open(f"{directory}/{INVENTORY}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as f:
        data = f.read(_LIMIT)
    if int.from_bytes(data[:4], "little") != _MAGIC or int.from_bytes(data[4:8], "little") != len(data) - 8:
        raise ImageError(f"{INVENTORY} of the checkpoint is damaged", hint="use another one (`cryoci list`)")
    return data[8:]


def _image(message: bytes) -> bytes:
    return _MAGIC.to_bytes(4, "little") + len(message).to_bytes(4, "little") + message
