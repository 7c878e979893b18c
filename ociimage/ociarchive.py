# SPDX-License-Identifier: Apache-2.0
"""An image layout as one tar (oci-archive of skopeo and podman, `ctr image export`): saved and loaded.

Reading trusts nothing: blobs are verified against the digests that are their names, before any of them is
in the layout under its name.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cryoci import files
from cryoci.errors import ConflictError, ImageError, IntegrityError, NotFoundError, SpaceError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import blob, inflate, parallel, strictjson, tar
from cryoci.ociimage.layout import MAX_INDEX, Layout
from cryoci.ociimage.manifest import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    Descriptor,
    Index,
    Manifest,
    dump,
)
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.registry import Registry

_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_BLOBS = "blobs/sha256/"
_IGNORED = ("manifest.json", "repositories", "blobs/", _BLOBS)  # docker's own index, and folders
MAX_BLOBS = 10_000


def looks_like(path: Path) -> bool:
    """Whether the first entry of the tar at `path` is of an image layout rather than of a checkpoint.

    What cannot be read is no image layout either.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(tar.BLOCK)
    except OSError:
        return False
    name = start[:100].split(b"\0", 1)[0].removeprefix(b"./")
    return name in (b"oci-layout", b"index.json") or name.startswith(b"blobs")


def load(path: Path, layout: Layout, *, progress: Progress | None = None) -> list[tuple[str, Descriptor]]:
    """Put the blobs of the archive into `layout` and return (name, descriptor) of its images; name may be "".

    Call it in `layout.session()`, and `put_manifest` what is to stay. Raises NotFoundError, ImageError,
    IntegrityError, SpaceError.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError as e:
        raise NotFoundError(f"no archive at {path}") from e
    seen = progress or Silent()
    with file:
        token = seen.start(path.name, os.fstat(file.fileno()).st_size)

        def read() -> Iterator[bytes]:
            while chunk := file.read(blob.CHUNK):
                seen.advance(token, len(chunk))
                yield chunk

        with parallel.Threads("cryoci-inflate", workers=2) as pool:
            index = _members(tar.Reader(inflate.inflate(read(), pool, limit=sys.maxsize)), layout)
        seen.done(token)
    if index is None:
        raise ImageError(f"{path} has no index.json: it is not an image archive")
    value = strictjson.load_object(index, "index.json", limit=MAX_INDEX)
    manifests = value.get("manifests")
    if value.get("schemaVersion") != 2 or not isinstance(manifests, list):
        raise ImageError(f"index.json of {path} is not an image index")
    found = [Descriptor.parse(m, f"index.json: manifest {i}") for i, m in enumerate(manifests)]
    return [(_name(entry), entry) for entry in found]


def _members(reader: tar.Reader, layout: Layout) -> bytes | None:
    index: bytes | None = None
    count = 0
    for entry in reader:
        name = entry.name.removeprefix("./")
        if entry.kind == tar.DIRECTORY and f"{name.rstrip('/')}/" in (*_IGNORED, "/"):
            continue
        if entry.kind != tar.FILE:
            raise ImageError(f"the archive holds a {entry.kind_name}, {entry.name[:200]!r}")
        if name.startswith(_BLOBS):
            count += 1
            if count > MAX_BLOBS:
                raise ImageError(f"the archive holds over {MAX_BLOBS} blobs")
            expected = Descriptor("", f"sha256:{name.removeprefix(_BLOBS)}", entry.size)
            if layout.has_blob(expected.digest, expected.size):
                for _ in reader.data():
                    pass
                continue
            layout.put_blob(blob.Opened(lambda: _bytes(reader)), expected, lambda n: None)
        elif name in ("index.json", "oci-layout", *_IGNORED):
            if entry.size > MAX_INDEX:
                raise ImageError(f"{name} of the archive is {entry.size} bytes")
            data = b"".join(_bytes(reader))
            if name == "index.json":
                if index is not None:
                    raise ImageError("the archive holds index.json twice")
                index = data
        else:
            raise ImageError(f"the archive holds {name[:200]!r}, which has no place in an image layout")
    return index


def _bytes(reader: tar.Reader) -> Iterator[bytes]:
    for piece in reader.data():
        yield bytes(piece)


def _name(entry: Descriptor) -> str:
    """The name of an image: containerd's full one first, as its ref.name is a tag alone."""
    return entry.annotations.get("io.containerd.image.name") or entry.annotations.get(families.REF_NAME, "")


@contextmanager
def scratch_layout() -> Iterator[Layout]:
    """An empty layout for the time of a with block."""
    with files.scratch("layout.") as place:
        yield Layout(place / "layout", create=True)


def save(
    store: Layout | Registry, reference: str, path: Path, name: str, *, progress: Progress | None = None
) -> int:
    """Write an image, as it is in `store`, to an archive at `path` under `name`; returns its bytes.

    The same image gives the same archive. Raises ConflictError, NotFoundError, IntegrityError, SpaceError.
    """
    if os.path.lexists(path):
        raise ConflictError(f"{path} exists", hint="name another file, or remove it")
    top = store.get_manifest(reference)
    parts, documents = _closure(store, top)
    seen = progress or Silent()
    token = seen.start(path.name, sum(part.size for part in parts))
    entry = Descriptor(top.media_type, top.digest, len(top.data), _names(name))
    index = dump({"schemaVersion": 2, "manifests": [entry.to_json()]})
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(part, "xb", opener=_private) as out:
            _put(out, "oci-layout", [_LAYOUT], len(_LAYOUT))
            _put(out, "index.json", [index], len(index))
            for digest, data in sorted(documents.items()):
                _put(out, _BLOBS + digest.removeprefix("sha256:"), [data], len(data))
            for descriptor in parts:
                where = _BLOBS + descriptor.digest.removeprefix("sha256:")
                chunks = _told(store.open_blob(descriptor), seen, token)
                _put(out, where, chunks, descriptor.size)
            out.write(tar.END)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        os.rename(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        if e.errno == 28:
            raise SpaceError(f"no space left for {path}", hint="free space, or name another place") from e
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    files.sync_directory(path.absolute().parent)
    seen.done(token)
    return size


def _names(name: str) -> dict[str, str]:
    """Annotations by which containerd, and podman and skopeo, name what they load."""
    return {"io.containerd.image.name": name, families.REF_NAME: name}


def _closure(store: Layout | Registry, top: blob.Fetched) -> tuple[list[Descriptor], dict[str, bytes]]:
    """Every blob below an image, each once, and the manifests on the way by digest."""
    documents = {top.digest: top.data}
    parts: dict[str, Descriptor] = {}
    if top.media_type in MANIFEST_TYPES:
        _add(Manifest.parse(top.data), parts)
    elif top.media_type in INDEX_TYPES:
        for child in Index.parse(top.data).manifests:
            if child.media_type in INDEX_TYPES:
                raise ImageError(
                    f"index {top.digest} holds another index", hint="save that one by its digest"
                )
            if child.media_type not in MANIFEST_TYPES:  # containerd's own checkpoints: blobs, not manifests
                parts[child.digest] = child
                continue
            if isinstance(store, Layout) and not store.has_blob(child.digest, child.size):
                continue  # a platform that was never copied here
            inner = store.get_manifest(child.digest)
            if inner.digest != child.digest:
                raise IntegrityError(f"manifest {child.digest} is not the one that the index promises")
            documents[child.digest] = inner.data
            _add(Manifest.parse(inner.data), parts)
    else:
        raise ImageError(f"{top.digest} is of type {top.media_type[:100]!r}, not an image")
    return list(parts.values()), documents


def _add(image: Manifest, parts: dict[str, Descriptor]) -> None:
    for part in (image.config, *image.layers):
        parts[part.digest] = part


def _put(out: IO[bytes], name: str, chunks: Iterable[bytes], size: int) -> None:
    out.write(tar.header(name, size))
    for chunk in chunks:
        out.write(chunk)
    out.write(tar.padding(size))


def _told(chunks: Iterator[bytes], progress: Progress, token: object) -> Iterator[bytes]:
    for chunk in chunks:
        progress.advance(token, len(chunk))
        yield chunk


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
