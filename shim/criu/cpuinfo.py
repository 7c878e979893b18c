# SPDX-License-Identifier: Apache-2.0
"""The processor of a checkpoint: CRIU's cpuinfo.img, and what of it another processor lacks.

CRIU writes it in a dump only when told to (--cpu-cap=image), which no runtime does; `criu cpuinfo dump` makes it
alone, in a few ms. A restore does not read it, so it is one more file beside the images.

IMAGE ::= COMMON_MAGIC CPUINFO_MAGIC SIZE MESSAGE                little endian u32, protobuf (images/cpuinfo.proto)
cpuinfo_entry ::= 1: cpuinfo_x86_entry ...    cpuinfo_x86_entry ::= ... 6: capability (u32, repeated) 7: model
"""

from __future__ import annotations

import os
import subprocess

from cryoci.errors import ImageError
from cryoci.protobuf import Message

NAME = "cpuinfo.img"
_X86, _CAPABILITY, _MODEL = 1, 6, 7
_LIMIT = 1 << 20  # bytes; CRIU's is some 150
_SECONDS = 10.0
# What CRIU compares (x86_ins_capability_mask in criu/arch/x86/cpu.c, 4.2), by word and bit, as /proc/cpuinfo names it.
_FLAGS: dict[int, dict[int, str]] = {
    0: {0: "fpu", 4: "tsc", 8: "cx8", 11: "sep", 15: "cmov", 19: "clflush", 23: "mmx", 24: "fxsr", 25: "sse",
        26: "sse2"},
    1: {11: "syscall", 22: "mmxext", 27: "rdtscp", 30: "3dnowext", 31: "3dnow"},
    3: {16: "rep_good", 20: "nopl"},
    4: {0: "pni", 1: "pclmulqdq", 3: "monitor", 9: "ssse3", 13: "cx16", 19: "sse4_1", 20: "sse4_2", 22: "movbe",
        23: "popcnt", 25: "aes", 26: "xsave", 27: "osxsave", 28: "avx", 29: "f16c", 30: "rdrand"},
    6: {5: "abm", 6: "sse4a", 7: "misalignsse", 8: "3dnowprefetch", 11: "xop", 16: "fma4", 21: "tbm"},
    9: {0: "fsgsbase", 3: "bmi1", 4: "hle", 5: "avx2", 8: "bmi2", 9: "erms", 11: "rtm", 14: "mpx", 16: "avx512f",
        17: "avx512dq", 18: "rdseed", 19: "adx", 23: "clflushopt", 26: "avx512pf", 27: "avx512er", 28: "avx512cd",
        29: "sha_ni", 30: "avx512bw", 31: "avx512vl"},
    10: {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1"},
    11: {1: "avx512vbmi", 6: "avx512_vbmi2", 8: "gfni", 9: "vaes", 10: "vpclmulqdq", 11: "avx512_vnni",
         12: "avx512_bitalg", 13: "tme", 14: "avx512_vpopcntdq", 22: "rdpid"},
    13: {0: "clzero"},
    18: {2: "avx512_4vnniw", 3: "avx512_4fmaps"},
}  # fmt: skip


def dump(criu: str, directory: str) -> None:
    """Write cpuinfo.img of this node into `directory`. Never raises: without it a checkpoint restores all the same."""
    try:
        subprocess.run(
            [criu, "cpuinfo", "dump", "--images-dir", directory, "--log-file", "/dev/null"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        pass


def read(directory: str | os.PathLike[str]) -> bytes:
    """The image's bytes; none when there is none."""
    try:
        with open(os.path.join(directory, NAME), "rb") as f:
            return f.read(_LIMIT)
    except OSError:
        return b""


def flags(image: bytes) -> frozenset[str]:
    """The features that CRIU compares, of an x86 image; none of one that is damaged or of another architecture."""
    try:
        values = x86(image).numbers(_CAPABILITY)
    except ImageError:
        return frozenset()
    return frozenset(
        name
        for number, bits in _FLAGS.items()
        if number < len(values)
        for bit, name in bits.items()
        if values[number] >> bit & 1
    )


def model(image: bytes) -> str:
    """The processor's name, as "Intel(R) Xeon(R) ..."; "" when the image does not say."""
    try:
        return x86(image).text(_MODEL).strip()
    except ImageError:
        return ""


def x86(image: bytes) -> Message:
    """The cpuinfo_x86_entry of an image; an empty one when there is none. Raises ImageError."""
    size = int.from_bytes(image[8:12], "little")
    return Message(image[12 : 12 + size]).message(_X86)
