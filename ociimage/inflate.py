# SPDX-License-Identifier: Apache-2.0
"""From a blob's bytes to its tar: the codec is told by magic, the result is bounded, reading runs ahead."""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator

from cryoci.errors import ImageError, SpaceError
from cryoci.ociimage import zstd
from cryoci.ociimage.parallel import Threads

PIECE = 1 << 20  # bytes of one decompressed result of gzip
_GZIP = b"\x1f\x8b"
_AHEAD = 2  # chunks that wait between the reader's thread and the consumer


def inflate(
    chunks: Iterable[bytes],
    pool: Threads,
    *,
    limit: int,
    room: int | None = None,
    ended: Callable[[int, int], None] | None = None,
) -> Iterator[bytes]:
    """The uncompressed content of `chunks` (zstd, gzip or plain), at most `limit` bytes of it.

    Always reads `chunks` to the end, so that whatever verifies them gets to speak. Raises ImageError when
    the stream is damaged or passes `limit`: a small blob that grows without end is an attack on the disk.
    Raises SpaceError when it passes `room`, the bytes that the disk has for it. `ended` hears of places from which
    `chunks` can be read alone: how many bytes of them, and of the content, lie before it.
    """
    source = iter(chunks)
    first = b""
    while len(first) < 4 and (more := next(source, None)) is not None:
        first += more
    joined = _chain(first, source)
    if first[:4] == zstd.MAGIC or (first[1:4] == b"\x2a\x4d\x18" and first[0] & 0xF0 == 0x50):
        content = zstd.decompress(joined, pool, ended)
    elif first[:2] == _GZIP:
        content = _gunzip(joined, ended)
    else:
        content = joined if ended is None else plain(joined, ended)
    total = 0
    for piece in content:
        total += len(piece)
        if room is not None and room < limit and total > room:
            raise SpaceError(
                f"no space left: the checkpoint holds more than the {room >> 20} MiB that are free",
                hint="make room there, or set TMPDIR to a directory on a larger file system",
            )
        if total > limit:
            raise ImageError(
                f"a layer holds more than the {limit} bytes that it may",
                hint="it lies about its size: do not use it",
            )
        yield piece
    for _ in source:
        raise ImageError("a layer goes on after its end")


def plain(chunks: Iterable[bytes], ended: Callable[[int, int], None]) -> Iterator[bytes]:
    """`chunks`, which are their own content; `ended` is as in `inflate`."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        ended(total, total)
        yield chunk


def ahead(chunks: Iterable[bytes]) -> Generator[bytes, None, None]:
    """`chunks`, read by a thread of its own: receiving and hashing overlap with inflating and writing."""
    waiting: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: bytes | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for chunk in chunks:
                if not put(chunk):
                    return
            put(None)
        except BaseException as e:
            put(e)

    thread = threading.Thread(target=read, name="cryoci-ahead", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest


def _gunzip(chunks: Iterator[bytes], ended: Callable[[int, int], None] | None) -> Iterator[bytes]:
    decoder = zlib.decompressobj(31)
    begun = False
    taken = given = 0
    try:
        for chunk in chunks:
            data = chunk
            taken += len(chunk)
            while data:
                begun = True
                if content := decoder.decompress(data, PIECE):
                    given += len(content)
                    yield content
                data = decoder.unconsumed_tail
                if decoder.eof:
                    data, decoder, begun = decoder.unused_data, zlib.decompressobj(31), False
                    if ended is not None:
                        ended(taken - len(data), given)
    except zlib.error as e:
        raise ImageError(f"layer is damaged: {e}") from e
    # output that was held back by PIECE needs one more round without input
    while begun and not decoder.eof and (content := decoder.decompress(b"", PIECE)):
        yield content
    if begun and not decoder.eof:
        raise ImageError("layer ends in the middle of a gzip stream")
