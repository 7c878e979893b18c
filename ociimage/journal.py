# SPDX-License-Identifier: Apache-2.0
"""What pushes that did not end had done, so that the next push of the same sends only what is missing.

    LIB/pushes/HEX     a line of JSON each: {"name", "upload"} an upload that was begun, {"name", "digest", "size"} one
                       that ended; HEX names the repository and what is pushed, LIB is /var/lib/cryoci or $CRYOCI_LIB

It only spares sending: whoever reads it packs and hashes every byte again. A push that ends well removes its own;
what nobody came back for goes after two weeks, when no registry has the upload any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoci.errors import ImageError
from cryoci.ociimage import strictjson
from cryoci.ociimage.blob import Stored

MAX_LINE = 16 << 10  # bytes; of an upload's address, mostly
MAX_JOURNAL = 4 << 20  # bytes
_AGE = 14 * 86400  # seconds


class Journal:
    """Of one push; may be used from several threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._uploads: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}
        for line in _read(fd).splitlines():
            self._take(line)

    def upload(self, name: str) -> str | None:
        """The address of the upload that was begun for `name`, if it did not end."""
        return self._uploads.get(name)

    def stored(self, name: str) -> Stored | None:
        """What `name` was when it had been sent."""
        return self._stored.get(name)

    def begun(self, name: str, url: str) -> None:
        """Note an upload."""
        self._write({"name": name, "upload": url})

    def ended(self, name: str, digest: str, size: int) -> None:
        """Note that an upload of `size` bytes was committed."""
        self._write({"name": name, "digest": digest, "size": size})

    def _take(self, line: bytes) -> None:
        try:
            value = strictjson.load_object(line, "journal", limit=MAX_LINE)
            name = str(value["name"])
            if "upload" in value:
                self._uploads[name] = str(value["upload"])
                self._stored.pop(name, None)
            else:
                self._stored[name] = Stored(str(value["digest"]), int(value["size"]), 0)
                self._uploads.pop(name, None)
        except (ImageError, KeyError, ValueError, TypeError):
            return  # the line that a kill cut off

    def _write(self, value: dict[str, str | int]) -> None:
        line = json.dumps(value).encode()
        with self._lock:
            self._take(line)
            _append(self._fd, line + b"\n")


@contextmanager
def opened(place: str, what: str) -> Iterator[Journal | None]:
    """The journal of pushes of `what` to the repository `place`, for the time of one of them.

    None when another push has it, or nothing can be written there: then this push cannot be taken up later.
    """
    base = Path(os.environ.get("CRYOCI_LIB") or "/var/lib/cryoci") / "pushes"
    path = base / hashlib.sha256(f"{place}\0{what}".encode("utf-8", "surrogateescape")).hexdigest()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(base)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield Journal(fd)
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    data = b""
    while len(data) < MAX_JOURNAL and (more := os.read(fd, MAX_JOURNAL - len(data))):
        data += more
    if data and not data.endswith(b"\n"):
        _append(fd, b"\n")
    return data


def _append(fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError:
        pass  # a full disk costs what this would have spared, not the push


def _sweep(base: Path) -> None:
    end = time.time() - _AGE
    for path in base.iterdir():
        if path.stat().st_mtime < end:
            path.unlink(missing_ok=True)
