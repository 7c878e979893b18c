# SPDX-License-Identifier: Apache-2.0
"""Protocol buffers, as much as CRIU's images and containerd's Any need: read with bounds, and one field written.

A message is a sequence of (number, wire type, value); what the numbers mean, the caller knows. Everything
that is malformed raises ImageError; nothing is allocated on the word of a length. Wire format:
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cryoci.errors import ImageError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}
_MASK = (1 << 64) - 1


class Message:
    """The fields of one message; accessors give the last value of a field, as the specification wants it."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._fields: dict[int, list[int | bytes]] = {}
        view = memoryview(data)
        for number, wire, value, _ in _walk(view):
            one: int | bytes
            if isinstance(value, int):
                one = value
            else:
                raw = bytes(view[slice(*value)])
                one = raw if wire == _BYTES else int.from_bytes(raw, "little")
            self._fields.setdefault(number, []).append(one)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def number(self, number: int, default: int = 0) -> int:
        """An unsigned integer, an enum or a bool."""
        values = self._fields.get(number)
        if values is None:
            return default
        if not isinstance(values[-1], int):
            raise ImageError(f"field {number} of a message is not a number: it is damaged")
        return values[-1]

    def numbers(self, number: int) -> list[int]:
        """A repeated integer, packed or not."""
        result: list[int] = []
        for value in self._fields.get(number, ()):
            if isinstance(value, int):
                result.append(value)
                continue
            at = 0
            while at < len(value):
                one, at = varint(value, at)
                result.append(one)
        return result

    def data(self, number: int) -> bytes:
        """A bytes field; empty when it is not there."""
        values = self._fields.get(number)
        if values is None:
            return b""
        if not isinstance(values[-1], bytes):
            raise ImageError(f"field {number} of a message is not bytes: it is damaged")
        return values[-1]

    def text(self, number: int) -> str:
        """A string; what is not UTF-8 in it is replaced."""
        return self.data(number).decode(errors="replace")

    def message(self, number: int) -> Message:
        """A message within; an empty one when it is not there."""
        return Message(self.data(number))

    def messages(self, number: int) -> list[Message]:
        """A repeated message."""
        values = self._fields.get(number, ())
        if not all(isinstance(value, bytes) for value in values):
            raise ImageError(f"field {number} of a message is not a message: it is damaged")
        return [Message(value) for value in values if isinstance(value, bytes)]


def spans(data: bytes | memoryview) -> Iterator[tuple[int, int | tuple[int, int], int]]:
    """Fields of a message: number, value (of bytes: where they lie), and where the value begins, with its length.

    Numbers of a fixed width are left out. Raises ImageError.
    """
    for number, wire, value, place in _walk(memoryview(data)):
        if wire not in _WIDTHS:
            yield number, value, place


def replaced(data: bytes, path: Sequence[int], value: bytes) -> bytes:
    """`data` with the message at `path`, a field number for each level, replaced. Raises ImageError without one."""
    wanted, *rest = path
    for number, place, at in spans(data):
        if number == wanted and isinstance(place, tuple):
            inner = replaced(data[slice(*place)], rest, value) if rest else value
            return data[:at] + encode(len(inner)) + inner + data[place[1] :]
    raise ImageError(f"a message has no field {wanted}: it is damaged")


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at offset `at`, and the offset after it. Raises ImageError."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK, at
        shift += 7
    raise ImageError("a message ends in the middle of a number: it is damaged")


def field(number: int, value: bytes) -> bytes:
    """A bytes, string or message field."""
    return encode(number << 3 | _BYTES) + encode(len(value)) + value


def encode(value: int) -> bytes:
    """A number that is not negative, as varint."""
    result = b""
    while value >= 0x80:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def number_field(number: int, value: int) -> bytes:
    """A field that is a number, not negative, as varint."""
    return encode(number << 3 | _VARINT) + encode(value)


def _walk(view: memoryview) -> Iterator[tuple[int, int, int | tuple[int, int], int]]:
    """Number, wire type and value (what is no varint: where it lies) of each field, and where its value begins."""
    at = 0
    while at < len(view):
        key, at = varint(view, at)
        number, wire, place = key >> 3, key & 7, at
        if number == 0:
            raise ImageError("a message has a field of number 0: it is damaged")
        if wire == _VARINT:
            value, at = varint(view, at)
            yield number, wire, value, place
            continue
        if wire == _BYTES:
            size, at = varint(view, at)
        elif wire in _WIDTHS:
            size = _WIDTHS[wire]
        else:
            raise ImageError(f"a message has a field of wire type {wire}: it is damaged")
        if size > len(view) - at:
            raise ImageError("a message ends in the middle of a field: it is damaged")
        yield number, wire, (at, at + size), place
        at += size
