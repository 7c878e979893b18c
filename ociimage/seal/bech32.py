# SPDX-License-Identifier: Apache-2.0
"""Bech32 (BIP 173), without its limit of 90 characters: how age writes keys."""

from __future__ import annotations

from collections.abc import Iterable

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def encode(prefix: str, data: bytes) -> str:
    """`data` under `prefix`, in lower case."""
    values = _regroup(data, 8, 5, pad=True)
    check = _polymod([*_expand(prefix), *values, 0, 0, 0, 0, 0, 0]) ^ 1
    values += [(check >> 5 * (5 - i)) & 31 for i in range(6)]
    return f"{prefix}1" + "".join(_ALPHABET[v] for v in values)


def decode(prefix: str, text: str) -> bytes:
    """The 32 bytes that `encode` was given. Raises ValueError; messages never hold the text."""
    if text != text.lower() and text != text.upper():
        raise ValueError("mixed case")
    found, one, rest = text.lower().rpartition("1")
    if not one or found != prefix or len(rest) != 58:
        raise ValueError(f"it does not begin with {prefix}1, or has another length")
    if any(c not in _ALPHABET for c in rest):
        raise ValueError("it has characters that no key has")
    values = [_ALPHABET.index(c) for c in rest]
    if _polymod([*_expand(prefix), *values]) != 1:
        raise ValueError("its checksum is wrong: it was mistyped")
    return bytes(_regroup(values[:-6], 5, 8, pad=False))


def _expand(prefix: str) -> list[int]:
    return [ord(c) >> 5 for c in prefix] + [0] + [ord(c) & 31 for c in prefix]


def _polymod(values: Iterable[int]) -> int:
    total = 1
    for value in values:
        top = total >> 25
        total = (total & 0x1FFFFFF) << 5 ^ value
        for i, generator in enumerate(_GENERATOR):
            total ^= generator if top >> i & 1 else 0
    return total


def _regroup(data: Iterable[int], have: int, want: int, *, pad: bool) -> list[int]:
    bits = total = 0
    result = []
    for value in data:
        total, bits = total << have | value, bits + have
        while bits >= want:
            bits -= want
            result.append(total >> bits & (1 << want) - 1)
    if pad and bits:
        result.append(total << want - bits & (1 << want) - 1)
    elif not pad and (bits >= have or total & (1 << bits) - 1):
        raise ValueError("its last bits are off")
    return result
