# SPDX-License-Identifier: Apache-2.0
"""[memory] of config.toml: who moves the memory of large processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryoci.errors import ConfigError
from cryoci.shim.criu.options import parse_size, unknown_key
from cryoci.shim.memory import sums

_MOST_THREADS = 16  # more do not read faster (measured on 16 cores)
_WRITES = ("auto", "buffered", "direct")
_SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class Settings:
    """`parallel`: areas of `threshold` bytes or more go out of band, in chunks of `chunk` bytes.

    `threads` None and `write` "auto" are chosen when memory moves (placement.py); `digest` is a kind of sums;
    `prefetch`: read chunk files while CRIU restores. `budget`: bytes of memory for chunks on their way to a sink
    (None: chosen, sink.py).
    """

    parallel: bool = False
    threshold: int = 64 << 20
    chunk: int = 64 << 20
    threads: int | None = None
    digest: int = sums.SHA256
    write: str = "auto"
    prefetch: bool = True
    budget: int | None = None

    @property
    def workers(self) -> int:
        """`threads`, else one for each CPU that we may use."""
        return self.threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))

    def changed(self, text: str) -> Settings:
        """These with "KEY=VALUE,..." over them, as config.toml has keys and values. Raises ConfigError."""
        digests = {number: name for name, number in sums.KINDS.items()}
        values: dict[str, Any] = {
            "engine": "parallel" if self.parallel else "criu",
            "threshold": self.threshold,
            "chunk": self.chunk,
            **({"threads": self.threads} if self.threads else {}),
            "digest": digests[self.digest],
            "write": self.write,
            "prefetch": self.prefetch,
            **({"budget": self.budget} if self.budget else {}),
        }
        for word in text.split(","):
            key, _, value = word.partition("=")
            values[key] = _SWITCHES.get(value, int(value) if value.isdecimal() else value)
        return self.from_mapping(values)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Check the table. Raises ConfigError."""
        known = {
            "engine": str,
            "threshold": int,
            "chunk": int,
            "threads": int,
            "digest": str,
            "write": str,
            "prefetch": bool,
            "budget": int,
        }
        for key in values:
            if key not in known:
                raise unknown_key(key, known, "[memory]")
        engine = values.get("engine", "criu")
        if engine not in ("criu", "parallel"):
            raise ConfigError(f"[memory] engine is {engine!r}", hint='write "criu" or "parallel"')
        threshold = parse_size(values.get("threshold", cls.threshold), "[memory] threshold")
        chunk = parse_size(values.get("chunk", cls.chunk), "[memory] chunk")
        if not 1 << 20 <= chunk <= 1 << 30 or chunk & (chunk - 1):
            raise ConfigError(
                f"[memory] chunk is {values.get('chunk')!r}", hint='write a power of two from "1M" to "1G"'
            )
        threads = values.get("threads")
        if "threads" in values and (
            not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= 64
        ):
            raise ConfigError(f"[memory] threads is {threads!r}", hint="write a whole number from 1 to 64")
        digest = values.get("digest", "sha256")
        if not isinstance(digest, str) or digest not in sums.KINDS:
            known_kinds = ", ".join(f'"{name}"' for name in sums.KINDS)
            raise ConfigError(f"[memory] digest is {digest!r}", hint=f"write one of {known_kinds}")
        write = values.get("write", cls.write)
        if write not in _WRITES:
            raise ConfigError(f"[memory] write is {write!r}", hint='write "auto", "buffered" or "direct"')
        prefetch = values.get("prefetch", True)
        if not isinstance(prefetch, bool):
            raise ConfigError(
                f"[memory] prefetch is {prefetch!r}", hint="write true or false, without quotes"
            )
        budget = parse_size(values["budget"], "[memory] budget") if "budget" in values else None
        if budget is not None and budget < 1 << 20:
            raise ConfigError(f"[memory] budget is {values['budget']!r}", hint='write "1M" or more')
        return cls(
            engine == "parallel",
            max(threshold, 1),
            chunk,
            threads,
            sums.KINDS[digest],
            write,
            prefetch,
            budget,
        )
