# SPDX-License-Identifier: Apache-2.0
"""The checkpoint images of `ctr container checkpoint`: an index whose "manifests" are the checkpoint's parts.

No registry takes them (containerd#8661), so they travel as archives (`ctr image export`, `import`). All
containerd versions restore them, also those whose CRI has no restore. Source: containerd 1.7
container_checkpoint_opts.go, container_restore_opts.go, services/tasks/local.go.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryoci import protobuf
from cryoci.errors import ImageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, blob, extract, inflate, parallel, strictjson, tar
from cryoci.ociimage.descriptions import Base, Converted
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import (
    INDEX,
    INDEX_TYPES,
    LAYER_GZIP,
    MANIFEST_TYPES,
    Descriptor,
    Index,
    dump,
    goarch,
)

_PREFIX = "application/vnd.containerd.container."
CRIU_TAR = _PREFIX + "criu.checkpoint.criu.tar"
CONFIG = _PREFIX + "checkpoint.config.v1+proto"
RUNTIME, SNAPSHOTTER = "io.containerd.checkpoint.runtime", "io.containerd.checkpoint.snapshotter"
_SPEC_TYPE = b"types.containerd.io/opencontainers/runtime-spec/1/Spec"
_SHIM = "io.containerd.runc.v2"
_TYPE_URL, _VALUE = 1, 2  # google.protobuf.Any


def is_checkpoint(index: Index) -> bool:
    """Whether this is an index of ctr's kind."""
    return any(part.media_type == CRIU_TAR for part in index.manifests)


def unpack(layout: Layout, index: Index, directory: Path) -> None:
    """Unpack the parts of `index` to a checkpoint directory, which must exist and be empty.

    Raises ImageError, IntegrityError, SpaceError.
    """
    parts = {part.media_type: part for part in reversed(index.manifests)}
    if CONFIG not in parts:
        raise ImageError("the checkpoint has no container configuration")
    value = protobuf.Message(blob.read_small(layout, parts[CONFIG], archive.MAX_JSON)).data(_VALUE)
    spec = strictjson.load_object(value, "the container's specification", limit=archive.MAX_JSON)
    with extract.Extractor(directory) as extractor, parallel.Threads("cryoci-inflate", workers=1) as pool:
        incoming = layout.open_blob(parts[CRIU_TAR])
        extractor.extract(inflate.inflate(incoming, pool, limit=parts[CRIU_TAR].size), folder="checkpoint")
    if LAYER_GZIP in parts:
        with open(directory / "rootfs-diff.tar", "xb") as file:
            for chunk in layout.open_blob(parts[LAYER_GZIP]):
                file.write(chunk)
    name = index.annotations.get(families.REF_NAME, "")
    base = next((m.digest for m in index.manifests if m.media_type in (*INDEX_TYPES, *MANIFEST_TYPES)), "")
    identity = _identity(spec)
    config = {
        "id": identity,
        "name": identity,
        "rootfsImageName": name,
        "rootfsImageRef": f"{name.rpartition(':')[0] if ':' in name.rpartition('/')[2] else name}@{base}"
        if base
        else name,
        "runtime": index.annotations.get(RUNTIME, _SHIM),
    }
    own = {"version": 1, "engine": "containerd", "container": {"id": identity, "name": identity}}
    for file_name, document in ((archive.SPEC, spec), (archive.CONFIG, config), (archive.OWN, own)):
        (directory / file_name).write_text(json.dumps(document, indent=2))


def pack(done: Converted, base: Base, layout: Layout, name: str) -> str:
    """Write a checkpoint in containerd's words to `layout` under `name`, in ctr's form; returns the digest."""
    directory, parts = done.directory, []
    platform = {"architecture": goarch(), "os": "linux"}
    images = sorted(p for p in (directory / "checkpoint").iterdir() if not p.is_symlink())

    def put(media_type: str, source: blob.Source) -> None:
        stored = layout.put_blob(source, None, lambda n: None)
        parts.append(Descriptor(media_type, stored.digest, stored.size, {}, platform))

    put(CRIU_TAR, blob.Opened(lambda: _tar(images)))
    spec = (directory / archive.SPEC).read_bytes()
    put(CONFIG, blob.Bytes(protobuf.field(_TYPE_URL, _SPEC_TYPE) + protobuf.field(_VALUE, spec)))
    diff = directory / "rootfs-diff.tar"
    if diff.exists():
        put(LAYER_GZIP, blob.Opened(lambda: _chunks(diff)))
    noted = {families.REF_NAME: base.name, RUNTIME: _SHIM, SNAPSHOTTER: "overlayfs"}
    index = dump(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [part.to_json() for part in parts],
            "annotations": noted,
        }
    )
    return layout.put_manifest(index, INDEX, name)


def _tar(images: list[Path]) -> Iterator[bytes]:
    for path in images:
        size = path.stat().st_size
        yield tar.header(path.name, size)
        yield from _chunks(path)
        yield tar.padding(size)
    yield tar.END


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(blob.CHUNK):
            yield chunk


def _identity(spec: dict[str, Any]) -> str:
    """The container's id: containerd makes it the last part of the cgroup's path."""
    linux = spec.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    return path.rpartition("/")[2].rpartition(":")[2] if isinstance(path, str) else ""
