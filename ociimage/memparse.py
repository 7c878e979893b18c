# SPDX-License-Identifier: Apache-2.0
"""Questions to the memory of a checkpoint: how much, what texts, where is this, what lies there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryoci import files
from cryoci.errors import ConflictError, TrustError, UsageError
from cryoci.ociimage import contents
from cryoci.ociimage.criu import areas, memory, processes
from cryoci.ociimage.criu.memory import PAGE, Area, Match, Memory
from cryoci.ociimage.reference import DirectoryRef, Reference
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.progress import Progress
    from cryoci.ociimage.seal.keyring import Identities

MAX_PATTERN = 4096  # bytes of one match


@dataclass(frozen=True)
class Wanted:
    """What to ask: `pid` None for a table; else one of search, regex, strings, span, or all that is stored."""

    pid: int | None = None
    maps: bool = False
    search: str | None = None
    regex: str | None = None
    strings: bool = False
    min_length: int = 6
    span: str | None = None
    context: int = 0
    limit: int = 10_000
    target: Path | None = None

    def check(self) -> None:
        """Raise UsageError for questions that do not go together."""
        asked = sum((self.maps, self.search is not None, self.regex is not None, self.strings))
        if self.pid is None and (asked or self.span or self.target):
            raise UsageError("which process?", hint="name one: --pid PID (see the table without options)")
        if asked > 1 or (asked and self.span):
            raise UsageError(
                "one question at a time: --maps, --search, --search-regex, --strings or --range"
            )
        if asked and self.target:
            raise UsageError("--output writes raw bytes: of a --range, or of all that is stored")
        if self.search == "":
            raise UsageError("nothing to search for", hint="give a text: --search TEXT")

    def pattern(self) -> re.Pattern[bytes] | None:
        """What to find. Raises UsageError for a regular expression that is none."""
        if self.search is not None:
            return re.compile(re.escape(self.search.encode()))
        if self.strings:
            return re.compile(rb"[\t\x20-\x7e]{%d,%d}" % (self.min_length, MAX_PATTERN))
        if self.regex is not None:
            try:
                return re.compile(self.regex.encode(), re.DOTALL)
            except re.error as e:
                raise UsageError(f"bad regular expression {self.regex!r}: {e}") from e
        return None


@dataclass(frozen=True)
class Row:
    """One process of the table; sizes in bytes."""

    pid: int
    name: str
    stored: int
    mapped: int
    heap: int
    shared: int


@dataclass(frozen=True)
class Mapping:
    """A mapped area and how many bytes of it are stored."""

    area: Area
    stored: int


@dataclass
class Answer:
    """What was found. Matches and pieces come as they are read, at most `limit`; `written` is of --output."""

    reference: str
    wanted: Wanted
    processes: tuple[Row, ...] = ()
    maps: tuple[Mapping, ...] = ()
    matches: Iterable[Match] = ()
    pieces: Iterable[tuple[int, bytes]] = ()
    written: int | None = None

    def to_json(self) -> Any:
        """As JSON has it: addresses as hexadecimal strings, bytes as hexadecimal digits."""
        found: dict[str, Any] = {"reference": self.reference}
        if self.written is not None:
            return found | {"file": str(self.wanted.target), "size": self.written}
        if self.wanted.pid is None:
            return found | {"processes": list(self.processes)}
        found["pid"] = self.wanted.pid
        if self.wanted.maps:
            return found | {"maps": list(self.maps)}
        if self.wanted.pattern() is not None:
            return found | {"matches": [_match(match) for match in self.matches]}
        ranges = [{"address": f"{at:#x}", "bytes": data.hex()} for at, data in self.pieces]
        return found | {"ranges": ranges}


def _match(match: Match) -> dict[str, str]:
    return {
        "address": f"{match.address:#x}",
        "area": match.area,
        "text": match.found.decode("latin-1"),
        "before": match.before.hex(),
        "after": match.after.hex(),
    }


@contextmanager
def opened(
    ref: Reference,
    wanted: Wanted,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> Iterator[Answer]:
    """Ask `wanted` of the checkpoint at `ref`; answers are read for as long as the with block runs.

    Raises UsageError, NotFoundError for a process that is not there, ConflictError when the output exists,
    and what fetching raises.
    """
    wanted.check()
    span = memory.parse_range(wanted.span) if wanted.span else None
    pattern = wanted.pattern()
    if wanted.target is not None and os.path.lexists(wanted.target):
        raise ConflictError(f"{wanted.target} exists", hint="name another file, or remove it")
    pid = wanted.pid if not wanted.maps else None
    with _fetched(ref, pid, progress, registry_options, identities) as found:
        if found.sealed:
            raise TrustError(
                f"{ref} is encrypted, and no key was given",
                hint="give --decrypt-key FILE of one of its recipients",
            )
        answer = Answer(str(ref), wanted)
        if wanted.pid is None:
            answer.processes = tuple(_rows(found))
            yield answer
            return
        held = Memory(found.directory, found.images, wanted.pid)
        if wanted.maps:
            answer.maps = tuple(_maps(held))
        elif pattern is not None:
            matches = held.find(pattern, context=wanted.context, overlap=MAX_PATTERN)
            answer.matches = islice(matches, wanted.limit)
        elif wanted.target is not None:
            answer.written = _write(held, span or (0, 1 << 64), wanted.target)
        else:
            answer.pieces = held.pieces(*(span or (0, 1 << 64)))
        yield answer


@contextmanager
def _fetched(
    ref: Reference,
    pid: int | None,
    progress: Progress | None,
    registry_options: RegistryOptions | None,
    identities: Identities | None,
) -> Iterator[contents.Contents]:
    """The descriptions and, with `pid`, its pages files; nothing is copied out of a directory."""
    if isinstance(ref, DirectoryRef):
        with contents.opened(ref) as found:
            yield found
        return
    keep: Callable[[str], bool] = contents.is_description
    if pid is not None:
        with contents.opened(
            ref, everything=True, progress=progress, registry_options=registry_options, identities=identities
        ) as found:
            if found.sealed:
                yield found
                return
            wanted = {run.pages for run in memory.runs(found.images, pid)}

        def keep(name: str) -> bool:
            return contents.is_description(name) or name in wanted

    with files.scratch("memory.") as place:
        with contents.opened(
            ref,
            keep,
            everything=True,
            place=place,
            progress=progress,
            registry_options=registry_options,
            identities=identities,
        ) as found:
            yield found


def _rows(found: contents.Contents) -> Iterator[Row]:
    for process in processes.read(found.images):
        mapped = memory.layout(found.images, process.pid)
        shared = sum(area.end - area.start for area in mapped.areas if area.shared)
        yield Row(
            process.pid, process.name, process.memory.stored, mapped.virtual, process.memory.heap, shared
        )


def _maps(held: Memory) -> Iterator[Mapping]:
    amounts = areas.stored(
        held.layout.areas, [(run.start, run.end, run.end - run.start) for run in held.runs]
    )
    for area, stored in zip(held.layout.areas, amounts, strict=True):
        yield Mapping(area, stored // PAGE * PAGE)


def _write(held: Memory, span: tuple[int, int], path: Path) -> int:
    """Write the stored bytes of a range one after another, as checkpointctl does; returns their number."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        for _, data in held.pieces(*span):
            file.write(data)
        return file.tell()
