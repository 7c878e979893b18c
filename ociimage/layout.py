# SPDX-License-Identifier: Apache-2.0
"""An OCI image layout (image-spec v1.1 image-layout.md) as a store that survives crashes and neighbours.

Blobs are written to a temporary name, synced and renamed; one whose digest is known, to a name with that digest,
so that what a killed process had of it is taken up. index.json changes only under the lock file
`.index.lock`. Whoever adds blobs holds `.blobs.lock` shared; collection takes it exclusively, so that it
never removes a blob whose index entry is still to come.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cryoci import files
from cryoci.errors import ImageError, NotFoundError, PrivilegeError, SpaceError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import blob, nearby, strictjson
from cryoci.ociimage.manifest import (
    INDEX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST,
    Descriptor,
    Index,
    Manifest,
    digest_of,
)

_LAYOUT = '{"imageLayoutVersion":"1.0.0"}'
_TEMPORARY = ".tmp-"
_HEX = re.compile(r"[0-9a-f]{64}\Z")
MAX_INDEX = 64 << 20  # bytes of index.json


class Layout:
    """The layout at `path`. `create` makes it on first use; else a missing one raises NotFoundError."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._blobs = path / "blobs" / "sha256"
        if create:
            self._create()
        marker = path / "oci-layout"
        if not marker.is_file():
            raise NotFoundError(
                f"no OCI layout at {path}", hint="push an image to it first: cryoci push DIR NAME"
            )
        version = strictjson.load_object(_small(marker, 4096), str(marker), limit=4096).get(
            "imageLayoutVersion"
        )
        if version != "1.0.0":
            raise ImageError(f"{marker} is of version {version!r}; 1.0.0 is known")

    def _create(self) -> None:
        if (self.path / "oci-layout").exists():
            return
        try:
            # memory of processes lies in here: root's eyes only
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            known = {".index.lock", ".blobs.lock", "blobs", "oci-layout", "index.json"}
            if {file.name for file in self.path.iterdir() if not file.name.endswith(".tmp")} - known:
                raise ImageError(
                    f"{self.path} is not empty and not an OCI layout", hint="name another directory"
                )
            with self._locked(".index.lock", fcntl.LOCK_EX):
                for folder in (self._blobs.parent, self._blobs):
                    folder.mkdir(mode=0o700, exist_ok=True)
                if not (self.path / "oci-layout").exists():
                    files.write_atomic(self.path / "oci-layout", _LAYOUT)
        except PermissionError as e:
            raise PrivilegeError(f"cannot write the layout at {self.path}", hint="run as root") from e

    # blobs

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep collection away while an image is written; collect what a failure leaves."""
        try:
            with self._locked(".blobs.lock", fcntl.LOCK_SH):
                yield
        except BaseException:
            self.collect()
            raise

    def has_blob(self, digest: str, size: int) -> bool:
        """Whether the blob is there, with that size."""
        try:
            return self._file(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def put_blob(
        self, source: blob.Source, expected: Descriptor | None, advance: Callable[[int], None]
    ) -> blob.Stored:
        """Store a blob: temporary name, fsync, rename. Raises IntegrityError, SpaceError.

        What a put of `expected` that was killed had written is hashed again, and the rest of `source` added.
        """
        if expected is not None and self.has_blob(expected.digest, expected.size):
            advance(expected.size)
            return blob.Stored(expected.digest, expected.size, 0)
        temporary, file = self._temporary(expected)
        try:
            with file:
                name, size, had = _fill(file, source, expected, advance)
                os.fsync(file.fileno())
                if expected is not None:
                    blob.check(name, size, expected)
                known = self.has_blob(name, size)
                os.rename(temporary, self._file(name))
            files.sync_directory(self._blobs)
        except BaseException as e:
            temporary.unlink(missing_ok=True)
            if isinstance(e, OSError) and e.errno in (28, 122):
                raise SpaceError(
                    f"no space left in {self.path}: {e.strerror}",
                    hint="remove old images (cryoci rm, cryoci gc), or give another place",
                ) from e
            raise
        return blob.Stored(name, size, 0 if known else size - had)

    def _temporary(self, expected: Descriptor | None) -> tuple[Path, BinaryIO]:
        """A file for a blob to come, locked: that which a killed process has left of it, else a new one."""
        if expected is not None:
            path = self._blobs / f"{_TEMPORARY}{self._file(expected.digest).name}"
            try:
                file = os.fdopen(_regular(os.fspath(path), os.O_RDWR | os.O_CREAT), "r+b", buffering=0)
            except ImageError:
                pass  # not ours
            else:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # who had the lock until now may have given the file its name
                    if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file.fileno())):
                        os.fchmod(file.fileno(), 0o600)
                        return path, file
                except (BlockingIOError, FileNotFoundError):
                    pass
                file.close()
        path = self._blobs / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        file = open(path, "x+b", buffering=0)  # noqa: SIM115
        os.fchmod(file.fileno(), 0o600)
        return path, file

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes, verified at their end."""
        return blob.verified(self.raw_blob(descriptor), descriptor)

    def raw_blob(self, descriptor: Descriptor, start: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `start` on, not verified: for whoever does that himself."""
        digest = descriptor.digest
        if (near := nearby.chunks(nearby.of_layout(self.path), descriptor, start)) is not None:
            yield from near
            return
        try:
            file = open(self._file(digest), "rb", buffering=0, opener=_regular)  # noqa: SIM115
        except FileNotFoundError as e:
            raise ImageError(f"{self.path} lacks blob {digest}", hint="push or pull the image again") from e
        with file:
            file.seek(start)
            while chunk := file.read(blob.CHUNK):
                yield chunk

    def _file(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        if algorithm != "sha256" or not _HEX.match(name):
            raise ImageError(f"bad digest {digest[:100]!r}")
        return self._blobs / name

    # images

    def get_manifest(self, reference: str) -> blob.Fetched:
        """The manifest or index that a name or digest leads to. Raises NotFoundError, IntegrityError."""
        descriptor = self.find(reference)
        if descriptor.size > MAX_MANIFEST:
            raise ImageError(f"manifest {descriptor.digest} is {descriptor.size} bytes")
        data = b"".join(self.open_blob(descriptor))
        return blob.Fetched(data, descriptor.media_type, descriptor.digest)

    def find(self, reference: str) -> Descriptor:
        """The descriptor with a name in index.json, or of a digest there or among the blobs."""
        entries = self.entries()
        for entry in entries:
            if reference in (entry.annotations.get(families.REF_NAME), entry.digest):
                return entry
        if reference.startswith("sha256:") and self._file(reference).is_file():
            data = _small(self._file(reference), MAX_MANIFEST)
            value = strictjson.load_object(data, f"blob {reference}", limit=MAX_MANIFEST)
            media_type = value.get("mediaType")
            if media_type in (*INDEX_TYPES, *MANIFEST_TYPES):
                return Descriptor(str(media_type), reference, len(data))
        have = ", ".join(sorted(n for e in entries if (n := e.annotations.get(families.REF_NAME)))[:8])
        raise NotFoundError(
            f"no image {reference} in {self.path}", hint=f"it has: {have}" if have else "it is empty"
        )

    def put_manifest(self, data: bytes, media_type: str, name: str | None) -> str:
        """Store a manifest or index; with `name`, index.json's entry of that name is replaced by it."""
        digest = digest_of(data)
        self.put_blob(blob.Bytes(data), Descriptor(media_type, digest, len(data)), lambda n: None)
        if name is not None:
            inner = Index.parse(data) if media_type in INDEX_TYPES else Manifest.parse(data)
            noted = {**inner.annotations, families.REF_NAME: name}
            with self._locked(".index.lock", fcntl.LOCK_EX):
                entries = self.entries()
                kept = [e for e in entries if e.annotations.get(families.REF_NAME) != name]
                if any(e not in kept and e.annotations.get(families.PIN) for e in entries):
                    noted[families.PIN] = "true"
                self._write_index([*kept, Descriptor(media_type, digest, len(data), noted)])
        return digest

    def names(self) -> list[str]:
        """All names in index.json, sorted."""
        return sorted(name for e in self.entries() if (name := e.annotations.get(families.REF_NAME)))

    def referrers(self, digest: str) -> list[Descriptor] | None:
        """None: a layout keeps no account of referrers but the index that clients write."""
        return None

    def entries(self) -> list[Descriptor]:
        """index.json's descriptors; none when it does not exist yet."""
        try:
            data = _small(self.path / "index.json", MAX_INDEX)
        except FileNotFoundError:
            return []
        value = strictjson.load_object(data, str(self.path / "index.json"), limit=MAX_INDEX)
        manifests = value.get("manifests")
        if value.get("schemaVersion") != 2 or not isinstance(manifests, list):
            raise ImageError(f"{self.path / 'index.json'} is not an image index")
        return [Descriptor.parse(m, f"index.json: manifest {i}") for i, m in enumerate(manifests)]

    def pins(self) -> list[str]:
        """The names that are pinned, sorted."""
        return sorted(
            name
            for e in self.entries()
            if e.annotations.get(families.PIN) and (name := e.annotations.get(families.REF_NAME))
        )

    def pin(self, name: str, pinned: bool) -> None:
        """Pin a name, so that retention keeps whatever image has it, or let it go. Raises NotFoundError."""
        with self._locked(".index.lock", fcntl.LOCK_EX):
            entries = self.entries()
            for i, e in enumerate(entries):
                if e.annotations.get(families.REF_NAME) == name:
                    rest = {k: v for k, v in e.annotations.items() if k != families.PIN}
                    noted = {**rest, families.PIN: "true"} if pinned else rest
                    entries[i] = Descriptor(e.media_type, e.digest, e.size, noted)
                    self._write_index(entries)
                    return
        raise NotFoundError(f"no image {name} in {self.path}")

    def untag(self, reference: str) -> None:
        """Take the image of that name, or all of that digest, out of index.json. Raises NotFoundError."""
        with self._locked(".index.lock", fcntl.LOCK_EX):
            entries = self.entries()
            kept = [e for e in entries if reference not in (e.annotations.get(families.REF_NAME), e.digest)]
            if len(kept) == len(entries):
                raise NotFoundError(f"no image {reference} in {self.path}")
            self._write_index(kept)

    def collect(self) -> int:
        """Remove blobs that no image needs; returns the bytes freed, 0 while an image is being written.

        Keeps everything when an image's manifest cannot be read: then nobody knows what it needs.
        """
        freed = 0
        try:
            with self._locked(".blobs.lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
                with self._locked(".index.lock", fcntl.LOCK_EX):
                    needed = set[str]()
                    for entry in self.entries():
                        self._reach(entry, needed)
                for file in self._blobs.iterdir():
                    if f"sha256:{file.name}" not in needed:
                        freed += file.stat().st_size
                        file.unlink()
        except (BlockingIOError, ImageError):
            return freed
        return freed

    def _reach(self, descriptor: Descriptor, needed: set[str]) -> None:
        if descriptor.digest in needed:
            return
        needed.add(descriptor.digest)
        if descriptor.media_type in (*INDEX_TYPES, *MANIFEST_TYPES):
            data = blob.read_small(self, descriptor, MAX_MANIFEST)
            if descriptor.media_type in INDEX_TYPES:
                for child in Index.parse(data).manifests:
                    # an index may list platforms that were never copied
                    if self.has_blob(child.digest, child.size):
                        self._reach(child, needed)
            else:
                image = Manifest.parse(data)
                needed.update(d.digest for d in (image.config, *image.layers))

    def _write_index(self, entries: list[Descriptor]) -> None:
        value: Mapping[str, Any] = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [entry.to_json() for entry in entries],
        }
        files.write_atomic(self.path / "index.json", json.dumps(value, indent=1, sort_keys=True))

    @contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)


def _fill(
    file: BinaryIO, source: blob.Source, expected: Descriptor | None, advance: Callable[[int], None]
) -> tuple[str, int, int]:
    """Write `source` to `file`; returns digest, size, and how much of it `file` had begun with already."""
    had = os.fstat(file.fileno()).st_size if expected is not None else 0
    rest = source.open_at(had) if expected is not None and 0 < had < expected.size else None
    if rest is not None:
        digest, size = blob.Digest(), 0
        while chunk := file.read(blob.CHUNK):
            digest.update(chunk)
            size += len(chunk)
            advance(len(chunk))
        size += _append(file, rest, digest, advance)
        if expected is not None and (digest.result(), size) == (expected.digest, expected.size):
            return expected.digest, size, had
        advance(-size)
    os.ftruncate(file.fileno(), 0)
    file.seek(0)
    digest = blob.Digest()
    size = _append(file, source.open(), digest, advance)
    return digest.result(), size, 0


def _append(
    file: BinaryIO, chunks: Iterator[bytes], digest: blob.Digest, advance: Callable[[int], None]
) -> int:
    size = 0
    for chunk in chunks:
        digest.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[file.write(view) :]
        size += len(chunk)
        advance(len(chunk))
    return size


def _small(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises ImageError for a larger one and for what is no file."""
    with open(path, "rb", buffering=0, opener=_regular) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ImageError(f"{path} is {size} bytes; at most {limit} are accepted")
        return file.read(limit)


def _regular(path: str, flags: int) -> int:
    """Open a regular file: a layout may come from elsewhere, with FIFOs and links in it."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise ImageError(f"{path} is a link, not a file") from e
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path} is not a regular file")
    return fd
