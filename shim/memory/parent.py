# SPDX-License-Identifier: Apache-2.0
"""An earlier checkpoint of a container: chunks that did not change since are linked to its files, not written again.

Memory is compared with the file itself, byte by byte, and not only by digest: as soon as the memory is dropped
the file holds the only copy, and a file that has rotted since must not.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from cryoci.errors import ImageError, IntegrityError
from cryoci.shim.memory import chain, chunk, index
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.chunk import Key, Written


class Parent:
    """The images in `directory`. Raises ImageError, UnsupportedError when they are no use. Close it."""

    def __init__(self, directory: str) -> None:
        content = index.read(directory)
        self._digests = dict(content.chunks)
        self._places = chain.Places(content, directory)
        self._local = threading.local()

    def link(self, where: int, key: Key, pid: int, pagemap: int, buffer: chunk.Buffer) -> Written | None:
        """Link the file of chunk `key` into the directory open as `where` if process `pid` holds just that.

        None when it does not, and when the file is damaged or on another file system. Raises OSError.
        """
        digest = self._digests.get(key)
        if not digest:
            return None
        try:
            with chunk.Reader(self._places.of(key), key, digest) as reader:
                if not reader.same(pid, pagemap, buffer, self._buffer()):
                    return None
                if not chain.link(reader.fd, key.name, where):
                    return None
                os.fsync(reader.fd)
                return Written(key, reader.stored * PAGE, digest)
        except (ImageError, IntegrityError):
            return None

    def verify(self, threads: int) -> None:
        """Compare all chunks with their digests, which brings them into the page cache too.

        To be called before the container is frozen. Raises ImageError, IntegrityError.
        """

        def one(entry: tuple[Key, str]) -> None:
            with chunk.Reader(self._places.of(entry[0]), *entry) as reader:
                reader.check(self._buffer())

        with ThreadPoolExecutor(threads, "cryoci-verify") as pool:
            for _ in pool.map(one, self._digests.items()):
                pass

    def _buffer(self) -> chunk.Buffer:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = chunk.Buffer()
        found: chunk.Buffer = self._local.buffer
        return found

    def close(self) -> None:
        self._places.close()
