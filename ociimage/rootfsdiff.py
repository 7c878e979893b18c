# SPDX-License-Identifier: Apache-2.0
"""rootfs-diff.tar in both forms: podman's and CRI-O's (tar + deleted.files), and an OCI layer (containerd's).

Deletions are a JSON list of paths in the one and empty `.wh.NAME` entries in the other (image-spec
layer.md, "Whiteouts"). File content is never unpacked: entries pass as the bytes that they are.

A layer may also say of a directory that nothing below shows through (`.wh..wh..opq`). The other form has no word for
that, and needs none: whoever unpacks it (containers/storage archive.Unpack, shim/rootfs.py) has a file replace a
directory with all that is in it, and a directory replace a file. So a file and then a directory of that name come
first.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cryoci.errors import ImageError
from cryoci.ociimage import archive, blob, inflate, parallel, strictjson, tar

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
MAX_DELETED = 64 << 20  # bytes of deleted.files
_LEVEL = 1  # of gzip: the content is cut out of an image, not kept in one


def read_deleted(path: Path) -> list[str]:
    """The paths in a deleted.files, relative to the root. Raises ImageError."""
    value = strictjson.loads(archive.read(path, MAX_DELETED), "deleted.files", limit=MAX_DELETED)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ImageError("deleted.files is not a list of paths")
    return [_safe(name) for name in value]


def write_deleted(path: Path, deleted: Sequence[str]) -> None:
    """The inverse of `read_deleted`, in podman's form."""
    path.write_text(json.dumps([f"/{name}" for name in deleted], indent=2))


def to_layer(diff: Path | None, deleted: Sequence[str], out: Path) -> None:
    """Write `diff` and whiteouts for `deleted` as a gzipped layer.

    The whiteouts come first: whoever applies a layer in order then removes nothing that it has added.
    """

    def content() -> Iterator[bytes]:
        for name in deleted:
            folder, slash, base = name.rpartition("/")
            yield tar.header(f"{folder}{slash}{WHITEOUT}{base}", 0)
        if diff is None:
            yield tar.END
            return
        with open(diff, "rb", buffering=0) as file:
            while chunk := file.read(blob.CHUNK):
                yield chunk

    zipper = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    with open(out, "xb") as file:
        for chunk in content():
            file.write(zipper.compress(chunk))
        file.write(zipper.flush())


def from_layer(layer: Path, out: Path) -> tuple[list[str], bool]:
    """Write the entries of a layer that are no whiteouts to the tar `out`.

    Returns what the layer deletes, and whether it hides all of the base image, which the tar cannot say. Raises
    ImageError. `out` is not made when the layer holds nothing else.
    """
    deleted, cleared, hides_all = _whiteouts(layer)
    written = len(cleared)
    with open(out, "xb") as file:
        for name in cleared:
            file.write(tar.header(name, 0) + tar.header(f"{name}/", 0, tar.DIRECTORY, mode=0o755))
        for name, head, data in _entries(layer):
            if name.rstrip("/").rpartition("/")[2].startswith(WHITEOUT):
                continue
            file.write(head)
            size = sum(file.write(piece) for piece in data)
            file.write(tar.padding(size))
            written += 1
        file.write(tar.END)
    if not written:
        out.unlink()
    return deleted, hides_all


def _whiteouts(layer: Path) -> tuple[list[str], list[str], bool]:
    """What a layer deletes, the directories that it clears (parents first), and whether it clears the root.

    A name that is deleted and made anew is replaced by what is made; if that is a directory, it is cleared.
    """
    deleted: dict[str, None] = {}
    opaque: set[str] = set()
    made: set[str] = set()  # directories, and what other entries lie in
    files: set[str] = set()
    for name, _, _ in _entries(layer):
        folder, _, base = name.rstrip("/").rpartition("/")
        if base == OPAQUE:
            opaque.add(_safe(folder) if folder.strip("./") else "")
        elif base.startswith(WHITEOUT):
            deleted[_safe(f"{folder}/{base.removeprefix(WHITEOUT)}")] = None
        elif name.strip("./"):
            path = _safe(name)
            (made if name.endswith("/") else files).add(path)
            while "/" in path and (path := path.rpartition("/")[0]) not in made:
                made.add(path)
    cleared = sorted((opaque | (deleted.keys() & made)) - {""})
    gone = [name for name in deleted if name not in made and name not in files]
    return gone, cleared, "" in opaque


def is_empty(path: Path) -> bool:
    """Whether a tar holds nothing but directories, such as that of an unused /dev/shm."""
    return all(name.endswith("/") or name in (".", "") for name, _, _ in _entries(path))


def _entries(path: Path) -> Iterator[tuple[str, bytes, Iterable[memoryview]]]:
    """(name, raw header blocks, data) of each entry of a tar in any compression; data left over is skipped."""

    def chunks() -> Iterator[bytes]:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(blob.CHUNK):
                yield chunk

    with parallel.Threads("cryoci-inflate", workers=1) as pool:
        reader = tar.Reader(inflate.inflate(chunks(), pool, limit=sys.maxsize))
        for entry, head in reader.raw():
            name = f"{entry.name.rstrip('/')}/" if entry.kind == tar.DIRECTORY else entry.name
            data = reader.data()
            yield name, head, data
            for _ in data:
                pass


def _safe(name: str) -> str:
    """A path of the container relative to its root. Raises ImageError for one that leads out, or nowhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in name or len(name) > 4096:
        raise ImageError(f"the checkpoint changes {name[:200]!r}, which is no path of a container")
    return "/".join(parts)
