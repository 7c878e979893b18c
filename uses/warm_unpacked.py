# SPDX-License-Identifier: Apache-2.0
"""`cryoci warm --to unpacked`: checkpoint directories of images of the local store, which a restore takes as they are.

    /var/lib/cryoci/unpacked/DIGEST/            root's alone, as all below it (beside the local store)
        image.json                              what the image says, and size and XXH3 of each file
        files/                                  the checkpoint directory

An image is verified as ever while it is unpacked: whose it is, and each byte against its sha256. After that only root
can change it, so what a restore has to find out is whether the disk or the memory has: it compares the sums of all
files, which takes a tenth of the time. What is not as it was is not restored; the image in the store is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoci import trace
from cryoci.errors import ConflictError, CryociError, NotFoundError, PrivilegeError, UnsupportedError
from cryoci.files import read_json, sync_tree, write_json
from cryoci.ociimage import archive, reference, stores, unpack
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import ENCRYPTED
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.reference import LayoutRef
from cryoci.ociimage.stores import Resolved
from cryoci.ociimage.trust.policy import Gate
from cryoci.ociimage.unpack import PulledImage
from cryoci.shim.memory import sums

_NOTE, _FILES = "image.json", "files"
_VERSION = 1
_PIECE = 16 << 20  # bytes that are summed by themselves
_BLOCK = 1 << 20  # bytes of one read
_WORKERS = 4


@dataclass(frozen=True)
class Unpacked:
    """An image that lies unpacked, `size` bytes of files."""

    reference: str
    digest: str
    size: int


def base() -> Path:
    """Where they are."""
    return reference.default_store().parent / "unpacked"


def put(ref: LayoutRef, *, progress: Progress | None = None) -> Unpacked:
    """Unpack an image of the local store, verified, if it is not there already.

    Raises UnsupportedError for an encrypted one, PrivilegeError, TrustError, SpaceError and what a pull raises.
    """
    if os.geteuid() != 0:
        raise PrivilegeError("unpacked images are root's alone: a restore trusts them", hint="use sudo")
    found = _resolve(ref)
    if any(layer.media_type.endswith(ENCRYPTED) for layer in found.manifest.layers):
        raise UnsupportedError(
            f"{ref} is encrypted, and would lie unpacked in the clear", hint="warm it --to cache or tmpfs"
        )
    base().mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep()
    place = _place(found)
    with ExitStack() as undo:
        if (known := undo.enter_context(_held(place))) is not None:
            try:
                return Unpacked(str(ref.name), found.top.digest, _compare(known, found).size)
            except CryociError:
                undo.close()
                _remove(place)
        made = Path(tempfile.mkdtemp(prefix=".new.", dir=base()))
        undo.callback(shutil.rmtree, made, ignore_errors=True)
        gate = Gate(ref, None)
        pulled = unpack.pull(ref, made / _FILES, progress=progress, gate=gate)
        checkpoint = archive.validate(made / _FILES)
        note = {
            "version": _VERSION,
            "reference": str(ref.name),
            "digest": pulled.digest,
            "manifest": pulled.manifest_digest,
            "annotations": dict(pulled.annotations),
            "files": {file.name: [file.size, _sum(made / _FILES / file.name)] for file in checkpoint.files},
        }
        write_json(made / _NOTE, note)
        sync_tree(made)
        made.rename(place)
        undo.pop_all()
    return Unpacked(str(ref.name), pulled.digest, checkpoint.size)


@contextmanager
def taken(
    ref: reference.Reference, gate: Gate, complain: Callable[[str], None]
) -> Iterator[PulledImage | None]:
    """The image `ref` as it lies here unpacked, for the time of a with block; None when it does not.

    `gate` is as in `unpack.pull`. Raises what it raises. One that is not as it was is told to `complain`, and is none.
    """
    if not isinstance(ref, LayoutRef) or ref.path != reference.default_store() or not base().is_dir():
        yield None
        return
    began = time.monotonic()
    found = _resolve(ref)
    with _held(_place(found)) as place:
        made = None
        if place is not None:
            gate(stores.open_source(ref), found.top.digest)
            try:
                made = _taken(place, ref, found, began)
            except (CryociError, OSError) as e:
                complain(f"what lies unpacked of {ref.name} is not as it was: {e}; its image is taken")
        yield made


def _taken(place: Path, ref: LayoutRef, found: Resolved, began: float) -> PulledImage:
    noted = {**(found.index.annotations if found.index else {}), **found.manifest.annotations}
    with trace.span("compare") as compared:
        checkpoint = _compare(place, found)
        compared["bytes"] = checkpoint.size
    size = sum(layer.size for layer in found.manifest.layers)
    return PulledImage(
        checkpoint.path,
        found.top.digest,
        found.manifest_digest,
        size,
        checkpoint.size,
        time.monotonic() - began,
        str(ref),
        noted,
        checkpoint,
        skipped=size,
        kept=True,
    )


def usage() -> tuple[Unpacked, ...]:
    """What lies unpacked."""
    found = []
    for place in _places():
        try:
            note = _note(place)
            size = sum(int(file[0]) for file in note["files"].values())
            found.append(Unpacked(str(note["reference"]), str(note["digest"]), size))
        except CryociError:
            found.append(Unpacked("damaged", f"sha256:{place.name}", 0))
    return tuple(found)


def drop(ref: LayoutRef | None) -> list[str]:
    """Remove what lies unpacked of an image, or all; returns the names. Raises ConflictError, NotFoundError."""
    gone = []
    for place, one in zip(_places(), usage(), strict=True):
        if ref is None or one.reference == ref.name or one.digest == ref.digest:
            _remove(place)
            gone.append(one.reference)
    return gone


def sweep() -> None:
    """Remove what is in the store no more, or was never finished. Never fails."""
    for left in base().glob(".new.*"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        there = {entry.digest for entry in Layout(reference.default_store()).entries()}
    except CryociError:
        there = set()
    for place in _places():
        if f"sha256:{place.name}" not in there:
            try:
                _remove(place)
            except CryociError:
                continue


def _resolve(ref: LayoutRef) -> Resolved:
    store = stores.open_source(ref)
    return stores.resolve(store, stores.source_name(ref, store))


def _place(found: Resolved) -> Path:
    return base() / found.top.digest.removeprefix("sha256:")


def _places() -> list[Path]:
    return sorted(path for path in base().glob("*") if path.is_dir() and not path.name.startswith("."))


@contextmanager
def _held(place: Path) -> Iterator[Path | None]:
    """`place`, which nobody removes within a with block; None when it is not there."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield place
    finally:
        os.close(fd)


def _remove(place: Path) -> None:
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise NotFoundError(f"{place} is gone") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place)
    except BlockingIOError as e:
        raise ConflictError(f"{place} is being restored", hint="try again when that is done") from e
    finally:
        os.close(fd)


def _note(place: Path) -> dict[str, Any]:
    try:
        note: Any = read_json(place / _NOTE)
        if note["version"] == _VERSION and isinstance(note["files"], dict):
            return dict(note)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise NotFoundError(f"{place} has no readable {_NOTE}", hint="cryoci warm --drop, then warm it again")


def _compare(place: Path, found: Resolved) -> archive.Checkpoint:
    """The checkpoint directory in `place`, each file as it was and root's alone. Raises ConflictError, ImageError."""
    note = _note(place)
    if (note["digest"], note["manifest"]) != (found.top.digest, found.manifest_digest):
        raise ConflictError(f"{place} is of another image")
    for top, folders, names in os.walk(place):
        for path in (Path(top), *(Path(top) / name for name in (*folders, *names))):
            _private(path)
    checkpoint = archive.validate(place / _FILES)
    there = {file.name: file.size for file in checkpoint.files}
    if there != {name: file[0] for name, file in note["files"].items()}:
        raise ConflictError("files are missing, new or of another size")
    for name, (_, wanted) in note["files"].items():
        if _sum(place / _FILES / name) != wanted:
            raise ConflictError(f"{name} has changed")
    return checkpoint


def _private(path: Path) -> None:
    seen = path.lstat()
    good = stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)
    if not good or seen.st_uid != os.geteuid() or seen.st_mode & 0o077:
        raise ConflictError(f"{path.name} is not root's alone")


def _sum(path: Path) -> str:
    """XXH3 of a file: of its pieces, one after another, for these are read by several threads."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        starts = range(0, os.fstat(fd).st_size, _PIECE)
        if len(starts) <= 1:
            return b"".join(_piece(fd, start) for start in starts).hex()
        with ThreadPoolExecutor(_WORKERS, "cryoci-sum") as pool:
            pieces = b"".join(pool.map(lambda start: _piece(fd, start), starts))
    finally:
        os.close(fd)
    whole = sums.new(sums.XXH3)
    assert whole is not None
    whole.update(pieces)
    return whole.digest().hex()


def _piece(fd: int, start: int) -> bytes:
    found = sums.new(sums.XXH3)
    assert found is not None
    block = memoryview(bytearray(_BLOCK))
    for at in range(start, start + _PIECE, _BLOCK):
        if not (size := os.preadv(fd, [block], at)):
            break
        found.update(block[:size])
    return found.digest()
