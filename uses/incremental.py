# SPDX-License-Identifier: Apache-2.0
"""Incremental checkpoints: which earlier checkpoint a new one shares memory with, and what is remembered for the next.

    record of the container   incremental.json   its newest checkpoint, and the process that it is of
    /var/lib/cryoci/chunks/ROOT/ID/checkpoint/   chunk files of its newest incremental image: links, so that what
                                                 does not change is not written a second time

Nothing leans on the parent: files are linked and layers named, so every checkpoint is whole. Whatever is wrong
with a parent costs the sharing, never the checkpoint; `notes` say why.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryoci.errors import ConfigError, ConflictError, CryociError, UnsupportedError
from cryoci.files import read_json, write_json
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, chunks, reference
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef, LayoutRef, Reference, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.trust.policy import Gate
from cryoci.shim import config, paths, underlying
from cryoci.shim.engines.adopted import owned
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import Restored
from cryoci.shim.memory import chain, find, index, sums
from cryoci.shim.memory.parent import Parent
from cryoci.shim.record import Record

NOTE = "incremental.json"
_VERSION = 1


@dataclass(frozen=True)
class Files:
    """Bytes of a checkpoint directory: its own, and those that are its parent's files."""

    new: int
    shared: int


@dataclass
class Lineage:
    """What a checkpoint of `container` shares: files of checkpoint directory `local`, layers of `image`.

    `keeps` says whether chunk files of an image are kept for the next one; `notes` are for the user.
    """

    container: Container
    local: Path | None = None
    image: chunks.Parent | None = None
    keeps: bool = False
    notes: list[str] = field(default_factory=list)

    def finish(self, directory: Path, *, thin: bool) -> Files:
        """The checkpoint directory is complete and its container runs on or has ended. Raises ConflictError, OSError.

        With `thin` it names what its parent has, instead of having it as well.
        """
        if _runs(self.container):
            remember(self.container, str(directory.resolve()))
        size = archive.validate(directory).size
        images = directory / chain.IMAGES
        if thin and self.local is not None:
            saved = chain.thin(str(images), str(self.local / chain.IMAGES))
            return Files(size - saved, saved)
        links = [path.stat() for path in images.glob("cryoci-memory-*")]
        shared = sum(info.st_size for info in links if info.st_nlink > 1)
        return Files(size - shared, shared)

    def stored(self, directory: Path, ref: LayoutRef | RegistryRef, digest: str) -> None:
        """The checkpoint in `directory` is the image `digest` at `ref` now, and its container runs on.

        Its chunk files are linked to where the next one finds them. Never fails: that only costs the sharing.
        """
        if isinstance(ref, LayoutRef):
            ref = replace(ref, path=ref.path.resolve())
        where = str(replace(ref, digest=digest))
        remember(self.container, where)
        if not self.keeps:
            return
        kept = _kept(self.container)
        fresh = kept.with_name(f"%{kept.name}")  # no container's id
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            images = directory / chain.IMAGES
            if not index.exists(str(images)):
                return
            (fresh / chain.IMAGES).mkdir(mode=0o700, parents=True)
            write_json(fresh / NOTE, _note(_pid(self.container), where))
            for path in images.glob("cryoci-memory*"):
                os.link(path, fresh / chain.IMAGES / path.name)
            shutil.rmtree(kept, ignore_errors=True)
            fresh.rename(kept)
        except OSError as e:
            shutil.rmtree(fresh, ignore_errors=True)
            self.notes.append(
                f"the next checkpoint writes all memory: chunk files cannot be linked to {kept}: {e.strerror}"
            )


def begin(
    container: Container,
    target: Reference,
    parent: str | None,
    *,
    sealed: bool = False,
    thin: bool = False,
    registry_options: RegistryOptions | None = None,
) -> Lineage:
    """What a checkpoint of `container` to `target` can share, with `parent` or its newest checkpoint.

    Raises ConfigError and UnsupportedError where checkpoints cannot be incremental, and ConflictError for a `parent`
    of another container, or with `thin` for one that is not beside `target`.
    """
    _check(container)
    sweep()
    found = Lineage(container, keeps=not sealed)
    known = _recalled(container)
    text = _whole(parent) if parent else known
    if text is None:
        found.notes.append(f"{container.name} has no earlier checkpoint: all of its memory is written")
    else:
        _look(found, target, text, text == known, sealed, registry_options)
    if thin and found.local is not None and isinstance(target, DirectoryRef):
        chain.sibling(f"{target.path}/{chain.IMAGES}", f"{found.local}/{chain.IMAGES}")
    return found


def remember(container: Container, where: str) -> None:
    """Note that `where` is the newest checkpoint of `container`, which runs. Never fails."""
    with suppress(OSError, CryociError, ValueError):
        _remember(Record(container.root, container.id), _pid(container), where)


def _remember(record: Record, pid: int, where: str) -> None:
    note = _note(pid, where)
    record.make()
    write_json(f"{record.directory}/{NOTE}", note)


def restored(made: Restored, root: str | None, where: str, digest: str = "") -> None:
    """Note that a container was restored from `where`, its parent therefore. Never fails, and asks no engine.

    `digest` is that of the image, where `where` has none.
    """
    with suppress(CryociError, OSError):
        ref = reference.parse(where)
        if digest and isinstance(ref, LayoutRef | RegistryRef):
            where = str(replace(ref, digest=digest))
        record = Record(None if made.engine == "podman" else root, made.id)
        if owned(record):  # nobody would take the note away with a container of a plain runtime
            _remember(record, made.pid, _whole(where))


def sweep() -> None:
    """Remove kept chunk files whose container has ended since. Never fails."""
    for key in _entries(_base()):
        for place in _entries(key):
            with suppress(OSError):
                if not _alive(place / NOTE):
                    shutil.rmtree(place, ignore_errors=True)


def _whole(text: str) -> str:
    """A reference as it is remembered: paths are absolute."""
    ref = reference.parse(text)
    if isinstance(ref, RegistryRef):
        return str(ref)
    return str(replace(ref, path=ref.path.resolve()))


def _look(
    found: Lineage,
    target: Reference,
    text: str,
    known: bool,
    sealed: bool,
    registry_options: RegistryOptions | None,
) -> None:
    container, kept = found.container, _kept(found.container)
    source = reference.parse(text)
    try:
        if isinstance(source, ArchiveRef):
            raise UnsupportedError("it is an archive", hint="unpack it: cryoci pull FILE.tar DIR")
        if isinstance(source, DirectoryRef):
            checkpoint = archive.validate(source.path)
            _same_container(container, text, checkpoint.facts.get("container.id", ""), known)
            found.local = _usable(source.path)
            if not isinstance(target, DirectoryRef):
                found.notes.append(f"its parent {text} is a directory: what is sent is not less for it")
            return
        if _alive(kept / NOTE) and read_json(kept / NOTE).get("reference") == text:
            found.local = _usable(kept)
        if isinstance(target, DirectoryRef):
            if found.local is None:
                raise UnsupportedError("it is an image, whose files are not on this node")
        elif sealed:
            found.notes.append("layers are encrypted under a key of their own: all of them are sent")
        else:
            found.image = _image(container, source, text, known, registry_options)
    except ConflictError:
        raise
    except (CryociError, OSError, ValueError) as e:
        why = e.message if isinstance(e, CryociError) else str(e)
        found.notes.append(f"nothing is shared with the parent {text}: {why}")


def _image(
    container: Container,
    source: LayoutRef | RegistryRef,
    text: str,
    known: bool,
    registry_options: RegistryOptions | None,
) -> chunks.Parent:
    gate = (
        None if known else Gate(source, registry_options)
    )  # what this node has made it knows by its digest
    found = chunks.parent(source, gate.options if gate else registry_options, gate)
    noted = found.annotations
    _same_container(container, text, noted.get(families.CONTAINER_ID, ""), known)
    if noted.get(families.FORMAT) != "1":
        raise UnsupportedError("it is of another format of cryoci's images")
    if found.problem:
        raise UnsupportedError(found.problem)
    if noted.get(families.CRYOCI + "memory.format") != index.FORMAT:
        raise UnsupportedError("its memory is in another format, or in pages of another size")
    return found


def _usable(directory: Path) -> Path | None:
    """`directory` if its chunk files are what their digests say. Raises ImageError, IntegrityError..."""
    above = Parent(str(directory / chain.IMAGES))
    try:
        above.verify(config.load().memory.workers)
    finally:
        above.close()
    return directory


def _check(container: Container) -> None:
    settings = config.load().memory
    if not settings.parallel or settings.digest != sums.SHA256:
        raise ConfigError(
            "an incremental checkpoint needs memory out of band, with digests that tell chunks apart for certain",
            hint=f'set engine = "parallel" (and digest = "sha256") in [memory] of {paths.config_file()}',
        )
    if container.engine == "podman" and container.facts.get("runtime.name") in underlying.DEFAULTS:
        raise UnsupportedError(
            f"podman runs {container.name} by {container.facts['runtime.name']}, so CRIU moves all of its memory, and "
            "no checkpoint can be incremental",
            hint="start it with `podman --runtime cryoci-runtime`",
        )


def _same_container(container: Container, text: str, other: str, known: bool) -> None:
    if not known and other != container.id:
        raise ConflictError(
            f"{text} is a checkpoint of another container ({other[:12] or 'unknown'}), not of {container.name}",
            hint="leave out --parent: the newest checkpoint of the container is taken",
        )


def _pid(container: Container) -> int:
    return int(container.state().get("pid", 0))


def _note(pid: int, where: str) -> dict[str, object]:
    return {"version": _VERSION, "reference": where, "pid": pid, "born": find.born(pid)}


def _recalled(container: Container) -> str | None:
    """Where the newest checkpoint of this run of the container is."""
    path = Path(Record(container.root, container.id).directory) / NOTE
    if not _alive(path):
        return None
    return str(read_json(path)["reference"])


def _alive(note: Path) -> bool:
    """Whether the process is there that a note is about."""
    try:
        value = read_json(note)
        return value["version"] == _VERSION and find.alive(int(value["pid"]), int(value["born"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _base() -> Path:
    return Path(paths.chunks_directory(None, "x")).parent.parent


def _kept(container: Container) -> Path:
    return Path(paths.chunks_directory(container.root, container.id))


def _runs(container: Container) -> bool:
    try:
        return container.status in ("running", "paused")
    except CryociError:
        return False


def _entries(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except OSError:
        return []
