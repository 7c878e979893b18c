# SPDX-License-Identifier: Apache-2.0
"""Digests of chunk files: sha256, or XXH3 of 128 bits, which is several times as fast and finds accidents only.

XXH3 is libxxhash.so.0's (Debian's libxxhash0, which apt needs), by ctypes: the runtime's Python sees no packages.
Both let other threads run while they work on large pieces.
"""

from __future__ import annotations

from typing import Any, Protocol

from cryoci.errors import UnsupportedError

NONE, SHA256, XXH3 = 0, 1, 2  # as in the file's head
KINDS = {"none": NONE, "sha256": SHA256, "xxh3": XXH3}
SIZES = {NONE: 0, SHA256: 32, XXH3: 16}  # bytes

_library: Any = None


class Sum(Protocol):
    """A digest in the making, as hashlib has them."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


def new(kind: int) -> Sum | None:
    """A new sum; None for NONE. Raises UnsupportedError where there is no libxxhash."""
    import hashlib  # not above: configuration is read by every `create`

    if kind == NONE:
        return None
    return hashlib.sha256() if kind == SHA256 else _Xxh3()


def check(digest: str) -> None:
    """Raise ValueError for what is no digest in hex, and not empty."""
    if len(digest) not in {2 * size for size in SIZES.values()} or not set(digest) <= set(
        "0123456789abcdef"
    ):
        raise ValueError("a digest is none")


def _load() -> Any:
    """libxxhash, 0.8 or later. Raises UnsupportedError."""
    global _library
    if _library is None:
        import ctypes

        class Hash(ctypes.Structure):
            _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]

        try:
            found = ctypes.CDLL("libxxhash.so.0")
            found.XXH3_createState.restype = ctypes.c_void_p
            found.XXH3_128bits_digest.restype = Hash
            for name in ("XXH3_freeState", "XXH3_128bits_reset", "XXH3_128bits_digest"):
                getattr(found, name).argtypes = [ctypes.c_void_p]
            found.XXH3_128bits_update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        except (OSError, AttributeError) as e:
            raise UnsupportedError(
                f"digests of kind xxh3 need libxxhash.so.0: {e}",
                hint="install it (Debian: libxxhash0, Fedora: xxhash-libs)",
            ) from e
        _library = found
    return _library


class _Xxh3:
    def __init__(self) -> None:
        self._library = _load()
        self._state = self._library.XXH3_createState()
        if not self._state:
            raise MemoryError
        self._library.XXH3_128bits_reset(self._state)

    def update(self, data: bytes | memoryview, /) -> None:
        import ctypes

        if isinstance(data, bytes):
            place: Any = ctypes.c_char_p(data)
        elif data:
            place = ctypes.byref(ctypes.c_char.from_buffer(data))
        else:
            return
        self._library.XXH3_128bits_update(self._state, place, len(data))

    def digest(self) -> bytes:
        """Canonical: the high half first, each in network order (xxhash.h, XXH128_canonicalFromHash)."""
        found = self._library.XXH3_128bits_digest(self._state)
        return int(found.high << 64 | found.low).to_bytes(16, "big")

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.XXH3_freeState(self._state)
