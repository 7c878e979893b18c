# SPDX-License-Identifier: Apache-2.0
"""NaCl's secretbox (XSalsa20-Poly1305), as far as a cosign key file needs it: one small message.

`cryptography` has Poly1305 but no Salsa20, and cosign encrypts its keys with nothing else. A key file is 138
bytes, so the cipher may be slow. Source: D. J. Bernstein, "Extending the Salsa20 nonce" and "The Salsa20
family of stream ciphers"; the tests hold NaCl's own vectors.
"""

from __future__ import annotations

import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

KEY = 32  # bytes
NONCE = 24
TAG = 16
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
_MASK = 0xFFFFFFFF
# (target, a, b, rotation): x[target] ^= (x[a] + x[b]) <<< rotation, columns and then rows
_QUARTERS = (
    (4, 0, 12, 7), (8, 4, 0, 9), (12, 8, 4, 13), (0, 12, 8, 18),
    (9, 5, 1, 7), (13, 9, 5, 9), (1, 13, 9, 13), (5, 1, 13, 18),
    (14, 10, 6, 7), (2, 14, 10, 9), (6, 2, 14, 13), (10, 6, 2, 18),
    (3, 15, 11, 7), (7, 3, 15, 9), (11, 7, 3, 13), (15, 11, 7, 18),
    (1, 0, 3, 7), (2, 1, 0, 9), (3, 2, 1, 13), (0, 3, 2, 18),
    (6, 5, 4, 7), (7, 6, 5, 9), (4, 7, 6, 13), (5, 4, 7, 18),
    (11, 10, 9, 7), (8, 11, 10, 9), (9, 8, 11, 13), (10, 9, 8, 18),
    (12, 15, 14, 7), (13, 12, 15, 9), (14, 13, 12, 13), (15, 14, 13, 18),
)  # fmt: skip


def seal(message: bytes, nonce: bytes, key: bytes) -> bytes:
    """Encrypt and authenticate; the tag comes first, as in NaCl. A nonce may serve a key once."""
    stream = _xsalsa20(len(message) + KEY, nonce, key)
    hidden = bytes(a ^ b for a, b in zip(message, stream[KEY:], strict=True))
    return Poly1305.generate_tag(stream[:KEY], hidden) + hidden


def unseal(box: bytes, nonce: bytes, key: bytes) -> bytes | None:
    """The message of `seal`; None when key, nonce or bytes are others."""
    if len(box) < TAG or len(nonce) != NONCE:
        return None
    tag, hidden = box[:TAG], box[TAG:]
    stream = _xsalsa20(len(hidden) + KEY, nonce, key)
    try:
        Poly1305.verify_tag(stream[:KEY], hidden, tag)
    except InvalidSignature:
        return None
    return bytes(a ^ b for a, b in zip(hidden, stream[KEY:], strict=True))


def _xsalsa20(length: int, nonce: bytes, key: bytes) -> bytes:
    mixed = _rounds(_state(key, nonce[:16]))
    inner = struct.pack("<8I", *(mixed[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))
    stream = b""
    for block in range(-(-length // 64)):
        start = _state(inner, nonce[16:] + struct.pack("<Q", block))
        done = _rounds(start)
        stream += struct.pack("<16I", *((a + b) & _MASK for a, b in zip(start, done, strict=True)))
    return stream[:length]


def _state(key: bytes, middle: bytes) -> list[int]:
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", middle)
    return [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]


def _rounds(state: list[int]) -> list[int]:
    x = list(state)
    for _ in range(10):
        for target, a, b, turn in _QUARTERS:
            total = (x[a] + x[b]) & _MASK
            x[target] ^= ((total << turn) | (total >> (32 - turn))) & _MASK
    return x
