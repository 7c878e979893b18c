# SPDX-License-Identifier: Apache-2.0
"""CRIU images made by hand, field by field, for what no real container of a test does."""

from __future__ import annotations

from pathlib import Path

from cryoci import protobuf
from cryoci.ociimage.criu.image import COMMON, MAGICS, SERVICE

Value = int | bytes | str | list[int]


def number(value: int) -> bytes:
    """A varint; negative numbers as the two's complement that protobuf makes of them."""
    value &= (1 << 64) - 1
    result = b""
    while value >= 0x80:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def message(**fields: Value | list[bytes]) -> bytes:
    """A message: `f3=7` is field 3; a list is a repeated field, not packed."""
    result = b""
    for name, value in fields.items():
        field = int(name[1:])
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                result += number(field << 3) + number(one)
            else:
                result += protobuf.field(field, one.encode() if isinstance(one, str) else one)
    return result


def image(kind: str, *messages: bytes) -> bytes:
    """An image file of these messages."""
    first = SERVICE if kind == "stats" else COMMON
    result = first.to_bytes(4, "little") + MAGICS[kind].to_bytes(4, "little")
    return result + b"".join(len(m).to_bytes(4, "little") + m for m in messages)


def write(directory: Path, **images: bytes) -> Path:
    """Write image files: `core_1=...` is checkpoint/core-1.img, `pages_2` and all others alike."""
    folder = directory / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / f"{name.replace('_', '-')}.img").write_bytes(data)
    return directory


def process(
    directory: Path,
    pid: int = 1,
    *,
    memory: dict[int, bytes] | None = None,
    name: str = "app",
    words: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Path:
    """One process whose memory at each address is those bytes, padded to pages."""
    pieces = {at: data + bytes(-len(data) % 4096) for at, data in (memory or {}).items()}
    core = message(
        f1=1,
        f2=message(f3=message(f13=message(f1=0b111))),
        f3=message(f1=1, f6=name),
        f4=message(f2=2),
        f5=message(f10=message(f1=1000, f2=100, f11=[0x20, 1])),
    )
    vmas = [message(f1=at, f2=at + len(data), f5=3, f6=0x22, f7=1 | 1 << 5) for at, data in pieces.items()]
    start, end, first, last = words
    mm = message(f6=0x1000, f7=0x3000, f8=start, f9=end, f10=first, f11=last, f12=7, f14=vmas)
    runs = [message(f1=at, f2=len(data) // 4096, f4=4) for at, data in pieces.items()]
    images = {
        f"core_{pid}": image("core", core),
        f"mm_{pid}": image("mm", mm),
        f"pagemap_{pid}": image("pagemap", message(f1=pid), *runs),
        f"pages_{pid}": b"".join(pieces.values()),
        f"fs_{pid}": image("fs", message(f1=8, f2=9)),
    }
    return write(directory, **images)
