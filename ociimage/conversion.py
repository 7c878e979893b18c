# SPDX-License-Identifier: Apache-2.0
"""From any reference to another engine's archive: fetched and verified, converted, written in one piece."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci import files
from cryoci.errors import ConflictError, ImageError, UnsupportedError, UsageError
from cryoci.ociimage import convert, ctr, dialects, ociarchive, unpack
from cryoci.ociimage.descriptions import Base, Converted, Lost
from cryoci.ociimage.export import export
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef, Reference
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.unpack import Gate

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities

CTR = "ctr"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Wanted:
    """What to write: for which engine, where, onto which base image (default: the checkpoint's own)."""

    engine: str
    path: Path
    base_name: str | None = None
    base_id: str = ""
    base_digest: str = ""
    strict: bool = False

    @property
    def base(self) -> Base | None:
        if self.base_name is None:
            if self.base_id or self.base_digest:
                raise UsageError("a base image's id or digest needs its name", hint="add --base-image NAME")
            return None
        if self.base_digest and not _DIGEST.match(self.base_digest):
            raise UsageError(
                f"bad digest {self.base_digest!r}", hint="a digest is sha256: and 64 hex digits"
            )
        return Base(self.base_name, self.base_id.removeprefix("sha256:"), self.base_digest)


@dataclass(frozen=True)
class Written:
    """An archive in another engine's form; `size` is in bytes."""

    path: Path
    size: int
    dialect: str
    lost: tuple[Lost, ...]
    assumed: tuple[str, ...]


def convert_to_archive(
    source: Reference,
    wanted: Wanted,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    gate: Gate | None = None,
    identities: Identities | None = None,
) -> Written:
    """Write `source` for another engine; what was written is read back and checked as that engine would.

    `gate` and `identities` are as in `unpack.pull`. Raises what `pull` raises, UsageError without a needed base
    image, UnsupportedError with `strict` when something is lost, ConflictError when the file exists.
    """
    base = wanted.base
    dialect = dialects.of("containerd" if wanted.engine == CTR else wanted.engine)
    if wanted.path.exists():
        raise ConflictError(f"{wanted.path} exists", hint="name another file, or remove it")
    fetched = _directory(source, progress, registry_options, gate, identities)
    with fetched as directory, files.scratch("convert.") as place:
        model = dialects.read(directory)
        bundled = wanted.engine == CTR
        done = convert.convert(model, dialect, place / "converted", base=base, bundled=bundled)
        if wanted.strict and done.lost:
            raise UnsupportedError(
                f"{wanted.engine} has no place for {', '.join(lost.what for lost in done.lost)}",
                hint="leave --strict out to write the archive without",
            )
        if found := dialects.problems(dialects.read(done.directory), dialect):
            raise ImageError(f"the archive would not be one of {dialect.name}'s: {'; '.join(found)}")
        if bundled:
            size = _write_ctr(done, model, base, wanted.path, progress)
        else:
            size = export(done.directory, ArchiveRef(wanted.path), progress=progress).size
    return Written(wanted.path, size, wanted.engine, tuple(done.lost), tuple(done.assumed))


def _write_ctr(
    done: Converted, model: dialects.Model, base: Base | None, path: Path, progress: Progress | None
) -> int:
    name = f"cryoci.local/checkpoint/{(model.facts.get('container.name') or 'container').lower()}:latest"
    with ociarchive.scratch_layout() as layout:
        with layout.session():
            digest = ctr.pack(done, base or convert.own_base(model), layout, name)
        return ociarchive.save(layout, digest, path, name, progress=progress)


@contextmanager
def _directory(
    source: Reference,
    progress: Progress | None,
    registry_options: RegistryOptions | None,
    gate: Gate | None,
    identities: Identities | None,
) -> Iterator[Path]:
    """The checkpoint directory of a reference, in a scratch place unless it is one already."""
    if isinstance(source, DirectoryRef):
        if gate is not None:
            gate(None, None)
        yield source.path
        return
    with files.scratch("convert-from.") as place:
        yield unpack.pull(
            source,
            place / "checkpoint",
            progress=progress,
            registry_options=registry_options,
            gate=gate,
            identities=identities,
        ).directory
