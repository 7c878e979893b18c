# SPDX-License-Identifier: Apache-2.0
"""Image layouts that lie in their manifests, or are no files."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryoci import protobuf
from cryoci.ociimage import annotations as families
from cryoci.ociimage import ctr, manifest
from tests.hostile.tars import ESCAPE, S, member, members_of, pack, whole


def layout_of(directory: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> str:
    """An image layout of the good checkpoint after `change` of its documents and blobs; returns a reference.

    The documents are `index`, `manifest` and `config`; what `change` makes of them gets right digests.
    """
    layer = pack(members_of(whole()))
    blobs = {manifest.digest_of(layer): layer}
    noted = families.build({"container.name": "victim"})
    documents: dict[str, Any] = {
        "config": {
            "architecture": manifest.goarch(),
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [manifest.digest_of(layer)]},
        },
        "manifest": {
            "schemaVersion": 2,
            "mediaType": manifest.MANIFEST,
            "layers": [_describe(manifest.LAYER_TAR, layer)],
            "annotations": noted,
        },
        "index": {"schemaVersion": 2, "mediaType": manifest.INDEX, "annotations": noted},
        "layout": {"imageLayoutVersion": "1.0.0"},
    }
    change(documents, blobs)
    config = _encode(documents["config"])
    documents["manifest"].setdefault("config", _describe(manifest.CONFIG, config))
    inner = _encode(documents["manifest"])
    documents["index"].setdefault("manifests", [_describe(manifest.MANIFEST, inner)])
    top = _encode(documents["index"])
    for data in (config, inner, top):
        blobs.setdefault(manifest.digest_of(data), data)
    (directory / "blobs/sha256").mkdir(parents=True)
    for digest, data in blobs.items():
        (directory / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)
    entry = {**_describe(manifest.INDEX, top), "annotations": {families.REF_NAME: "x"}}
    entry.update(documents.get("entry", {}))
    (directory / "index.json").write_bytes(_encode({"schemaVersion": 2, "manifests": [entry]}))
    (directory / "oci-layout").write_bytes(_encode(documents["layout"]))
    return f"oci:{directory}:x"


def _encode(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def _describe(media_type: str, data: bytes, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": manifest.digest_of(data), "size": len(data), **more}


Change = Callable[[dict[str, Any], dict[str, bytes]], None]


def _top(part: str, **values: Any) -> Change:
    return lambda documents, blobs: documents[part].update(values)


def _layer(**values: Any) -> Change:
    return lambda documents, blobs: documents["manifest"]["layers"][0].update(values)


def _more_layers(*tars: bytes) -> Change:
    def change(documents: dict[str, Any], blobs: dict[str, bytes]) -> None:
        for data in tars:
            blobs[manifest.digest_of(data)] = data
            documents["manifest"]["layers"].append(_describe(manifest.LAYER_TAR, data))
            documents["config"]["rootfs"]["diff_ids"].append(manifest.digest_of(data))

    return change


def _swap(documents: dict[str, Any], blobs: dict[str, bytes]) -> None:
    """The bytes of one layer under the digest of another."""
    other = pack([member("stats-dump", b"other")])
    _more_layers(other)(documents, blobs)
    first, second = (layer["digest"] for layer in documents["manifest"]["layers"])
    blobs[first], blobs[second] = blobs[second], blobs[first]


def _index_in_index(documents: dict[str, Any], blobs: dict[str, bytes]) -> None:
    inner = _encode({"schemaVersion": 2, "mediaType": manifest.INDEX, "manifests": []})
    blobs[manifest.digest_of(inner)] = inner
    documents["index"]["manifests"] = [_describe(manifest.INDEX, inner)]


def _ctr(config: bytes, criu: bytes) -> Change:
    def change(documents: dict[str, Any], blobs: dict[str, bytes]) -> None:
        blobs[manifest.digest_of(config)], blobs[manifest.digest_of(criu)] = config, criu
        documents["index"]["manifests"] = [_describe(ctr.CONFIG, config), _describe(ctr.CRIU_TAR, criu)]

    return change


D0 = "sha256:" + "0" * 64
_KIND, _RAW = families.LAYER_KIND, families.LAYER_RAW_SIZE
LAYOUTS: dict[str, Change] = {
    "blob-missing": _layer(digest=D0),
    "blob-short": _layer(size=10**9),
    "blob-long": _layer(size=10),
    "size-negative": _layer(size=-1),
    "size-text": _layer(size="10"),
    "size-absurd": _layer(size=1 << 70),
    "digest-path": _layer(digest="sha256:../../../../etc/shadow"),
    "digest-md5": _layer(digest="md5:" + "0" * 32),
    "digest-case": _layer(digest="sha256:" + "A" * 64),
    "layer-swap": _swap,
    "layer-type": _layer(mediaType="application/x-evil"),
    "layer-encrypted": _layer(mediaType=manifest.LAYER_TAR + "+encrypted"),
    "layer-twice": lambda d, b: d["manifest"]["layers"].append(dict(d["manifest"]["layers"][0])),
    "layers-many": lambda d, b: d["manifest"].update(layers=d["manifest"]["layers"] * 600),
    "layers-none": _top("manifest", layers=[]),
    "layer-overwrites": _more_layers(pack([member("config.dump", b"{}")])),
    "layer-whiteout": _more_layers(pack([member(".wh.config.dump")])),
    "layer-links": _more_layers(pack([member("volumes", type=S, linkname="/tmp")])),
    "raw-size-small": _layer(annotations={_RAW: "1024"}),
    "raw-size-huge": _layer(annotations={_RAW: "9" * 17}),
    "raw-size-junk": _layer(annotations={_RAW: "-1"}),
    "kind-path": _layer(annotations={_KIND: "../../etc/passwd"}),
    "kind-lies": _layer(annotations={_KIND: "checkpoint/pages-1.img", _RAW: "4096"}),
    "kind-escape": _layer(annotations={_KIND: ESCAPE}),
    "annotations-numbers": _top("manifest", annotations={"a": 1}),
    "annotations-lie": _top("index", annotations={families.RAW_SIZE: "x", families.CREATED: ESCAPE}),
    "no-annotations": lambda d, b: (d["manifest"].update(annotations={}), d["index"].update(annotations={}))[
        0
    ],
    "manifest-and-index": _top("manifest", manifests=[]),
    "manifest-of-index-type": _top("manifest", mediaType=manifest.INDEX),
    "manifest-version": _top("manifest", schemaVersion=1),
    "config-not-json": lambda d, b: d.update(config=b"junk"),
    "config-huge": _top("manifest", config={"mediaType": manifest.CONFIG, "digest": D0, "size": 1 << 40}),
    "config-diff-ids": lambda d, b: d["config"]["rootfs"].update(diff_ids=[]),
    "config-windows": _top("config", os="windows"),
    "index-loop": lambda d, b: d["index"].update(
        manifests=[{"mediaType": manifest.INDEX, "digest": D0, "size": 5}]
    ),
    "index-in-index": _index_in_index,
    "index-empty": _top("index", manifests=[]),
    "index-long": _top("index", manifests=[{"mediaType": "x", "digest": D0, "size": 1}] * 5000),
    "index-not-list": _top("index", manifests={"a": 1}),
    "index-deep": lambda d, b: d.update(index={"a": json.loads("[" * 200 + "]" * 200), "manifests": []}),
    "entry-type": lambda d, b: d.update(entry={"mediaType": "text/html"}),
    "entry-size": lambda d, b: d.update(entry={"size": 1}),
    "layout-version": _top("layout", imageLayoutVersion="9"),
    "layout-junk": lambda d, b: d.update(layout=b"junk"),
    "ctr-config-junk": _ctr(b"\xff" * 20, pack([member("inventory.img", b"x")])),
    "ctr-config-list": _ctr(protobuf.field(2, b"[]"), pack([member("inventory.img", b"x")])),
    "ctr-tar-out": _ctr(protobuf.field(2, b"{}"), pack([member("../evil", b"x")])),
    "ctr-tar-link": _ctr(protobuf.field(2, b"{}"), pack([member("x", type=S, linkname="/etc")])),
    "ctr-tar-deep": _ctr(protobuf.field(2, b"{}"), pack([member("a/b", b"x")])),
    "ctr-no-inventory": _ctr(protobuf.field(2, b"{}"), pack([member("a", b"x")])),
}


def blob_fifo(directory: Path) -> str:
    """A layout one of whose blobs is a FIFO that nobody writes to."""
    reference = layout_of(directory, lambda d, b: None)
    victim = max((directory / "blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
    victim.unlink()
    os.mkfifo(victim)
    return reference


def blob_link(directory: Path) -> str:
    """A layout one of whose blobs is a link out of it."""
    reference = layout_of(directory, lambda d, b: None)
    victim = max((directory / "blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
    victim.unlink()
    victim.symlink_to("/etc/passwd")
    return reference


def index_fifo(directory: Path) -> str:
    """A layout whose index.json is a FIFO."""
    reference = layout_of(directory, lambda d, b: None)
    (directory / "index.json").unlink()
    os.mkfifo(directory / "index.json")
    return reference


PLACES = {"blob-fifo": blob_fifo, "blob-link": blob_link, "index-fifo": index_fifo}


def saved(directory: Path, out: Path) -> str:
    """The layout at `directory` as an image archive, index first; returns its path."""
    with tarfile.open(out, "w") as file:
        for name in ("oci-layout", "index.json", "blobs"):
            file.add(directory / name, name)
    return str(out)
