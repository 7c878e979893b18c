# SPDX-License-Identifier: Apache-2.0
"""zstd: independent frames, made and opened on several threads (RFC 8878)."""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from cryoci.errors import ImageError
from cryoci.ociimage.parallel import LEAST, Threads

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd
else:
    from compression import zstd

MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
MAX_FRAME = 32 << 20  # bytes; a frame that is larger, either way, or of unknown size, is streamed
PIECE = 1 << 20  # bytes of one streamed result
_FED, _OPENED = 256 << 10, 512 << 10  # bytes of a frame, and of its content, at a time
_HELD = 32 << 20  # bytes of content from which no more than LEAST frames are opened at the same time
_DICT_SIZES, _FCS_SIZES = (0, 1, 2, 4), (0, 2, 4, 8)


def frame_compressor(level: int) -> Callable[[memoryview], bytes]:
    """A function that makes one frame, content size included, of one buffer; not to be shared by threads."""
    compressor = zstd.ZstdCompressor(level=level)
    return lambda data: compressor.compress(data, zstd.ZstdCompressor.FLUSH_FRAME)


def decompress(
    chunks: Iterable[bytes], pool: Threads, ended: Callable[[int, int], None] | None = None
) -> Iterator[bytes]:
    """The content of a zstd stream; frames of moderate, known size are opened in parallel.

    `ended` hears at the end of such a frame how many bytes of `chunks`, and of content, there are up to it, before its
    content is given. Memory stays within a few MAX_FRAME whatever the headers claim. Raises ImageError.
    """
    most = min(pool.depth - 1, pool.workers + 1)  # one more is with whoever writes it
    pending: deque[tuple[Future[list[bytes]], int]] = deque()
    buffer = _Buffer(chunks)
    given = held = 0

    def take() -> list[bytes]:
        nonlocal given, held
        future, end = pending.popleft()
        content = future.result()
        opened = sum(map(len, content))
        given += opened
        held -= opened
        if ended is not None:
            ended(end, given)
        return content

    try:
        while buffer.have(4):
            number = int.from_bytes(buffer.peek(4), "little")
            if number in _SKIPPABLE:
                buffer.skip(8 + int.from_bytes(buffer.need(8)[4:], "little"))
                continue
            if buffer.peek(4) != MAGIC:
                raise ImageError("layer is damaged: no zstd frame where one should begin")
            size, head = _content_size(buffer)
            length = _frame_length(buffer, head) if size is not None and size <= MAX_FRAME else None
            if length is not None and size is not None:
                pending.append((pool.submit(_open_frame, buffer.cut(length), size), buffer.taken))
                held += size
                while len(pending) >= most or (len(pending) >= LEAST and held > _HELD):
                    yield from take()
            else:
                while pending:
                    yield from take()
                for content in _stream(buffer):
                    given += len(content)
                    yield content
        while pending:
            yield from take()
        if buffer.rest():
            raise ImageError("layer ends in the middle of a zstd frame")
    except zstd.ZstdError as e:
        raise ImageError(f"layer is damaged: {e}") from e
    finally:
        for future, _ in pending:
            future.cancel()


def _open_frame(data: bytes, size: int) -> list[bytes]:
    """The content of a frame, in pieces: to make one of them all would need the memory of both."""
    # a frame may hold far more than its header says (RLE blocks): never ask for more than the claim
    decoder, left, source = zstd.ZstdDecompressor(), size + 1, iter(_cut(data))
    found: list[bytes] = []
    while left and not decoder.eof:
        piece = next(source, b"") if decoder.needs_input else b""
        if not piece and decoder.needs_input:
            break
        content = decoder.decompress(piece, min(left, _OPENED))
        left -= len(content)
        found.append(content)
    if left != 1 or not decoder.eof:
        raise ImageError(f"a zstd frame does not hold the {size} bytes that its header promises")
    return found


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), _FED):
        yield data[start : start + _FED]


def _stream(buffer: _Buffer) -> Iterator[bytes]:
    decoder = zstd.ZstdDecompressor()
    data = b""
    while True:
        if decoder.needs_input and not (data := buffer.some()):
            raise ImageError("layer ends in the middle of a zstd frame")
        content = decoder.decompress(data, PIECE)
        data = b""
        if content:
            yield content
        if decoder.eof:
            buffer.give_back(decoder.unused_data)
            return


def _content_size(buffer: _Buffer) -> tuple[int | None, int]:
    """The frame's content size (None: not stored) and the length of its header. RFC 8878, 3.1.1.1."""
    flags = buffer.need(5)[4]
    single, fcs = flags >> 5 & 1, flags >> 6
    if flags & 0x08:
        raise ImageError("layer is damaged: a reserved bit is set in a zstd frame header")
    start = 5 + (0 if single else 1) + _DICT_SIZES[flags & 3]
    width = _FCS_SIZES[fcs] or single
    field = buffer.need(start + width)[start:]
    if not width:
        return None, start
    return int.from_bytes(field, "little") + (256 if width == 2 else 0), start + width


def _frame_length(buffer: _Buffer, head: int) -> int | None:
    """The frame's compressed length, found by hopping over its blocks; None when it is over MAX_FRAME."""
    position, checksum = head, buffer.peek(5)[4] >> 2 & 1
    while position <= MAX_FRAME + 1024:
        if not buffer.have(position + 3):
            raise ImageError("layer ends in the middle of a zstd frame")
        block = buffer.at(position)
        kind, size = block >> 1 & 3, block >> 3
        if kind == 3:
            raise ImageError("layer is damaged: a zstd block is of the reserved type")
        position += 3 + (1 if kind == 1 else size)
        if block & 1:
            position += 4 * checksum
            if not buffer.have(position):
                raise ImageError("layer ends in the middle of a zstd frame")
            return position
    return None


class _Buffer:
    """Bytes that arrived and are not used yet."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._data = bytearray()
        self.taken = 0  # bytes that were cut, skipped or used

    def have(self, n: int) -> bool:
        """Whether `n` bytes are there, or can be had."""
        while len(self._data) < n:
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._data += chunk
        return True

    def need(self, n: int) -> bytes:
        if not self.have(n):
            raise ImageError("layer ends in the middle of a zstd frame")
        return self.peek(n)

    def peek(self, n: int) -> bytes:
        return bytes(self._data[:n])

    def at(self, position: int) -> int:
        """The 24-bit number at `position`, which is there."""
        low, high = struct.unpack_from("<HB", self._data, position)
        return int(low | high << 16)

    def cut(self, n: int) -> bytes:
        with memoryview(self._data) as view:
            result = bytes(view[:n])
        self._drop(n)
        return result

    def skip(self, n: int) -> None:
        while n:
            if not self.have(1):
                raise ImageError("layer ends in the middle of a zstd frame")
            step = min(n, len(self._data))
            self._drop(step)
            n -= step

    def some(self) -> bytes:
        """Whatever is there, at least one byte; empty at the end."""
        return self.cut(len(self._data)) if self.have(1) else b""

    def give_back(self, data: bytes) -> None:
        self._data[:0] = data
        self.taken -= len(data)

    def rest(self) -> int:
        return len(self._data)

    def _drop(self, n: int) -> None:
        del self._data[:n]  # at once, which gives its memory back
        self.taken += n
