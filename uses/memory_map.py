# SPDX-License-Identifier: Apache-2.0
"""Where the memory of a checkpoint's processes lies: in CRIU's pages, out of band, or nowhere because it is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryoci.ociimage import chunks, contents
from cryoci.ociimage.criu import areas, memory
from cryoci.ociimage.criu.image import Images
from cryoci.ociimage.criu.processes import Process
from cryoci.shim.memory import chunk, index
from cryoci.shim.memory.calls import PAGE

KERNELS = frozenset({"vdso", "vvar", "vsyscall"})  # made anew by the kernel


@dataclass(frozen=True)
class Region:
    """A mapped area; bytes of it in CRIU's pages and out of band. `kind` is as in ociimage.criu.memory.Area."""

    start: int
    end: int
    rights: str
    kind: str
    stored: int
    apart: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def rest(self) -> int:
        """Bytes that the checkpoint does not store: zero or never touched, or a file's, or the kernel's."""
        return max(0, self.size - self.stored - self.apart)

    @property
    def rest_is(self) -> str:
        """What these are: "zero", "file", "shared" (stored once for all that share it) or "kernel"."""
        if self.kind in KERNELS:
            return "kernel"
        return {"file": "file", "shared": "shared"}.get(self.kind, "zero")


@dataclass(frozen=True)
class Map:
    """The memory of one process."""

    pid: int
    name: str
    regions: tuple[Region, ...]

    @property
    def size(self) -> int:
        return sum(one.size for one in self.regions)

    @property
    def stored(self) -> int:
        return sum(one.stored for one in self.regions)

    @property
    def apart(self) -> int:
        return sum(one.apart for one in self.regions)

    def kinds(self) -> list[tuple[str, tuple[Region, ...]]]:
        """The regions by kind, the largest kind first."""
        found: dict[str, list[Region]] = {}
        for one in self.regions:
            found.setdefault(one.kind, []).append(one)
        whole = [(kind, tuple(of)) for kind, of in found.items()]
        return sorted(whole, key=lambda pair: (-sum(one.size for one in pair[1]), pair[0]))


def keep(name: str) -> bool:
    """What `read` needs of a checkpoint: its descriptions and the index of memory out of band."""
    return contents.is_description(name) or name == chunks.INDEX


def read(found: contents.Contents, processes: Sequence[Process]) -> list[Map]:
    """The maps of `processes`. Raises ImageError, UnsupportedError for images or an index that are damaged."""
    apart: dict[int, list[areas.Span]] = {}
    folder = str((found.directory / chunks.INDEX).parent)
    if index.exists(folder):
        for key, _ in index.read(folder).chunks:
            apart.setdefault(key.vpid, []).append((key.start, key.end, _bytes_of(found, key)))
    images = found.images
    return [_map(images, process, apart.get(process.pid, ())) for process in processes]


def _map(images: Images, process: Process, apart: Sequence[areas.Span]) -> Map:
    mapped = memory.layout(images, process.pid).areas
    runs = [(run.start, run.end, run.end - run.start) for run in memory.runs(images, process.pid)]
    both = zip(mapped, areas.stored(mapped, runs), areas.stored(mapped, apart), strict=True)
    return Map(
        process.pid,
        process.name,
        tuple(Region(one.start, one.end, one.rights, _kind(one), *amounts) for one, *amounts in both),
    )


def _kind(area: memory.Area) -> str:
    return "shared" if area.shared and area.kind == "anonymous" else area.kind


def _bytes_of(found: contents.Contents, key: chunk.Key) -> int:
    """Bytes of pages in a chunk file, from its size; all of its range where nobody says how large it is."""
    size = found.sizes.get(f"checkpoint/{key.name}")
    whole = key.pages * PAGE
    if size is None:
        return whole
    return min(whole, max(0, size - chunk.data_offset(key.pages)) // PAGE * PAGE)
