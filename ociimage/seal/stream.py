# SPDX-License-Identifier: Apache-2.0
"""A layer as a stream of authenticated records (the STREAM construction of Hoang, Reyhanitabar, Rogaway, Vizar).

    LAYER  ::= RECORD... LAST      each 1 MiB of content and a tag of 16 bytes; LAST may be shorter
    nonce  ::= counter (11 bytes, big endian) | 01 for LAST, else 00

AES-256-GCM. Cutting off, reordering, repeating or joining records fails at the first one that is off. A key serves one
layer of one push and says which: index, number of layers, title and media type are in its derivation, so that
layers cannot be exchanged, left out or renamed either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cryoci.errors import ImageError, IntegrityError

CIPHER = "CRYOCI_AES_256_GCM_STREAM_1M"
KEY = 32  # bytes
CHUNK = 1 << 20  # bytes of content per record
TAG = 16
_DEPTH = 3  # records in flight


@dataclass(frozen=True)
class Place:
    """What a layer's key is bound to."""

    index: int
    count: int
    title: str
    media_type: str


def layer_key(image_key: bytes, place: Place) -> bytes:
    """The key of one layer."""
    words = (CIPHER, str(place.index), str(place.count), place.media_type, place.title)
    info = b"".join(len(word.encode()).to_bytes(4, "big") + word.encode() for word in words)
    return HKDF(algorithm=hashes.SHA256(), length=KEY, salt=None, info=info).derive(image_key)


class Sealer:
    """Encrypts one layer; `seal` may be called again for the same content, when a transfer starts over.

    The tags of what was made before are kept and compared: other content under the same key and nonces would give
    the key away, so it is refused before it leaves.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._tags: list[bytes] = []

    def seal(self, content: Iterable[bytes]) -> Iterator[bytes]:
        """The records of `content`. Raises ImageError when it is not what it was the first time."""
        pending: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(1, "cryoci-seal") as pool:
            try:
                for number, (chunk, last) in enumerate(_chunks(content, CHUNK)):
                    pending.append(pool.submit(self._record, number, chunk, last))
                    if len(pending) == _DEPTH:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _record(self, number: int, chunk: bytearray | memoryview, last: bool) -> bytes:
        record = self._cipher.encrypt(_nonce(number, last), chunk, None)
        if number == len(self._tags):
            self._tags.append(record[-TAG:])
        elif self._tags[number] != record[-TAG:]:
            raise ImageError("a file of the checkpoint changed while it was encrypted", hint="push it again")
        return record


def unseal(key: bytes, records: Iterable[bytes]) -> Iterator[bytes]:
    """The content of `records`, each authenticated before it is given out. Raises IntegrityError."""
    cipher = AESGCM(key)

    def opened(number: int, record: bytearray | memoryview, last: bool) -> bytes:
        try:
            return cipher.decrypt(_nonce(number, last), record, None)
        except InvalidTag:
            raise IntegrityError(
                f"an encrypted layer does not open at record {number}"
                + (", its last: it may have been cut off" if last else ""),
                hint="it was cut, altered, or exchanged for another layer: do not restore it",
            ) from None

    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(1, "cryoci-unseal") as pool:
        try:
            for number, (record, last) in enumerate(_chunks(records, CHUNK + TAG)):
                pending.append(pool.submit(opened, number, record, last))
                if len(pending) == _DEPTH:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


def _chunks(content: Iterable[bytes], size: int) -> Iterator[tuple[bytearray | memoryview, bool]]:
    """`content` in pieces of `size`; the last, marked so, may be shorter, and is empty only when all is."""
    buffer = bytearray()
    for piece in content:
        view = memoryview(piece)
        while view:
            if len(buffer) == size:
                yield buffer, False
                buffer = bytearray()
            if not buffer and len(view) > size:  # a whole piece, and not the last: no copy
                yield view[:size], False
                view = view[size:]
                continue
            taken = size - len(buffer)
            buffer += view[:taken]
            view = view[taken:]
    yield buffer, True
