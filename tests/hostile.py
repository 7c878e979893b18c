# SPDX-License-Identifier: Apache-2.0
"""Hostile checkpoints, made by hand, and what must never happen when any verb is given one.

`ARCHIVES`, `DOCUMENTS`, `IMAGES` and `LAYOUTS` are the corpus; `exercise` gives one to every verb and returns
what went wrong, which must be nothing: files outside of the sandbox, links, devices, odd modes, tracebacks,
control characters on the terminal. bench/fuzz_archives.py goes on from here at random.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import shutil
import stat
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner

from cryoci.errors import CryociError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, ctr, manifest, protobuf, tar
from tests.unit import criu_images
from tests.unit.criu_images import image, message

Members = list[tuple[tarfile.TarInfo, bytes]]
GOOD_NAME = "config.dump"
ESCAPE = "\x1b[31m"


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A tar member; `fields` are those of TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def pack(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of them."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form, errors="surrogateescape") as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data) if data else None)
    return packed.getvalue()


def raw(
    kind: bytes, name: bytes = b"config.dump", size: int = 0, link: bytes = b"", data: bytes = b""
) -> bytes:
    """A header that tarfile would not write, with its data."""
    block = bytearray(tar.header("x", 0))
    block[0:100] = name[:100].ljust(100, b"\0")
    block[124:136] = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
    block[156:157] = kind
    block[157:257] = link.ljust(100, b"\0")
    return seal(bytes(block)) + data + tar.padding(len(data))


def seal(block: bytes) -> bytes:
    """The header with a right checksum."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block[:512]) + block[156:]


def pax(**records: str) -> bytes:
    """A PAX header; dots of a key are written as two underscores."""
    body = b""
    for key, value in records.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + 1
        while length != len(str(length)) + len(text):
            length = len(str(length)) + len(text)
        body += str(length).encode() + text
    return raw(b"x", b"pax", len(body), data=body)


CONFIG: dict[str, Any] = {
    "id": "ab" * 32,
    "name": "victim",
    "rootfsImageID": "cd" * 32,
    "rootfsImageName": "localhost/base:1",
    "runtime": "runc",
}
SPEC: dict[str, Any] = {"annotations": {"io.container.manager": "libpod"}, "mounts": [], "linux": {}}


def whole(**changes: bytes | None) -> dict[str, bytes]:
    """The files of a good small checkpoint; `changes` replace, add or remove (None), `/` written as `__`."""
    words = b"app\0A=" + ESCAPE.encode() + b"\0"
    folder = Path("checkpoint")
    files: dict[str, bytes] = {
        "config.dump": json.dumps(CONFIG).encode(),
        "spec.dump": json.dumps(SPEC).encode(),
        "rootfs-diff.tar": pack([member("etc/new", b"x")]),
        "deleted.files": b'["/old"]',
    }
    for name, data in _images(words).items():
        files[str(folder / name)] = data
    for name, change in changes.items():
        key = name.replace("__", "/").replace("DASH", "-").replace("DOT", ".")
        if change is None:
            files.pop(key)
        else:
            files[key] = change
    return files


def _images(words: bytes) -> dict[str, bytes]:
    page = words.ljust(4096, b"\0")
    return {
        "inventory.img": image("inventory", message(f1=2)),
        "pstree.img": image("pstree", message(f1=1, f2=0, f3=1, f4=1, f5=[1])),
        "core-1.img": image("core", message(f1=1, f3=message(f1=1, f6=f"n{ESCAPE}"), f4=message(f2=2))),
        "mm-1.img": image(
            "mm", message(f8=0x1000, f9=0x1004, f10=0x1004, f11=0x1010, f14=[message(f1=0x1000, f2=0x2000)])
        ),
        "pagemap-1.img": image("pagemap", message(f1=1), message(f1=0x1000, f2=1, f4=4)),
        "pages-1.img": page,
        "files.img": image("files", message(f1=1, f2=9, f3=message(f6=f"/{ESCAPE}"))),
        "fdinfo-2.img": image("fdinfo", message(f1=9, f3=1, f4=0)),
    }


def members_of(files: dict[str, bytes]) -> Members:
    """Them as tar members."""
    return [member(name, data) for name, data in sorted(files.items())]


def _tar(*more: tuple[tarfile.TarInfo, bytes]) -> Callable[[], bytes]:
    return lambda: pack([*members_of(whole()), *more])


def _raw(*more: bytes, end: bytes = tar.END) -> Callable[[], bytes]:
    return lambda: (
        pack(members_of(whole())).rstrip(b"\0").ljust(512, b"\0")[:0] + _open_end() + b"".join(more) + end
    )


def _open_end() -> bytes:
    """The good archive without its end, so that more can follow."""
    result = b""
    for name, data in sorted(whole().items()):
        result += tar.header(name, len(data)) + data + tar.padding(len(data))
    return result


def _zip_bomb() -> bytes:
    """256 MB that say so: small on the wire, and holes on the disk."""
    head = gzip.compress(_open_end() + tar.header("checkpoint/pages-9.img", 256 << 20))
    return head + gzip.compress(bytes(64 << 20)) * 4 + gzip.compress(tar.END)


S, L, D = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "dot-dot": _tar(member("../evil", b"x")),
    "dot-dot-inside": _tar(member("checkpoint/../../evil", b"x")),
    "dot-dot-folder": _tar(member("checkpoint/..", type=D)),
    "absolute": _tar(member("/etc/cron.d/evil", b"x")),
    "double-slash": _tar(member("checkpoint//evil", b"x")),
    "dots": _tar(member("././evil", b"x")),
    "backslashes": _tar(member("..\\..\\evil", b"x")),
    "deep": _tar(member("checkpoint/a/b", b"x")),
    "deep-folder": _tar(member("checkpoint/a", type=D)),
    "unknown": _tar(member("evil", b"x")),
    "hidden": _tar(member("checkpoint/.ssh", b"x")),
    "bad-volume": _tar(member("volumes/x.sh", b"x")),
    "volume-out": _tar(member("volumes/../x.tar", b"x")),
    "case": _tar(member("CONFIG.DUMP", b"x")),
    "case-folder": _tar(member("Checkpoint/x", b"x")),
    "unicode-dots": _tar(member("checkpoint/\u2025/evil", b"x")),
    "fullwidth-slash": _tar(member("checkpoint\uff0fevil", b"x")),
    "control": _tar(member(f"checkpoint/{ESCAPE}", b"x")),
    "newline": _tar(member("checkpoint/a\nb", b"x")),
    "not-utf-8": _tar(member("checkpoint/\udcff", b"x")),
    "long": _tar(member("checkpoint/" + "n" * 5000, b"x")),
    "empty-name": _raw(raw(b"0", b"")),
    "blank-name": _raw(raw(b"0", b" ")),
    "nul-in-pax-path": _raw(pax(path="a\0b"), raw(b"0")),
    "symlink": _tar(member("stats-dump", type=S, linkname="/etc/shadow")),
    "symlink-log": _tar(member("ctr.log", type=S, linkname="/etc/shadow")),
    "symlink-then-file": _tar(member("volumes", type=S, linkname="/tmp"), member("volumes/evil.tar", b"x")),
    "two-symlinks": _tar(member("s", type=S, linkname="."), member("t", type=S, linkname="s/..")),
    "parent-elsewhere": _tar(member("checkpoint/parent", type=S, linkname="/etc")),
    "parent-to-itself": _tar(member("checkpoint/parent", type=S, linkname="parent")),
    "parent-twice": _tar(*[member("checkpoint/parent", type=S, linkname="../pre-checkpoint")] * 2),
    "parent-without-target": _tar(member("checkpoint/parent", type=S, linkname="../pre-checkpoint")),
    "through-parent": _tar(
        member("checkpoint/parent", type=S, linkname="../pre-checkpoint"),
        member("checkpoint/parent/x", b"x"),
    ),
    "hardlink": _tar(member("stats-dump", type=L, linkname="config.dump")),
    "hardlink-out": _tar(member("stats-dump", type=L, linkname="/etc/passwd")),
    "hardlink-with-data": _raw(raw(b"1", size=600, link=b"spec.dump", data=b"x" * 600)),
    "character-device": _tar(member("stats-dump", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "block-device": _tar(member("stats-dump", type=tarfile.BLKTYPE, devmajor=8)),
    "fifo": _tar(member("stats-dump", type=tarfile.FIFOTYPE)),
    "setuid": lambda: pack([(_mode(i, 0o6777), d) for i, d in members_of(whole())]),
    "no-mode": lambda: pack([(_mode(i, 0), d) for i, d in members_of(whole())]),
    "folder-of-all-modes": _tar(member("volumes", type=D, mode=0o7777, uid=12345)),
    "capabilities": _raw(pax(SCHILY__xattr__security__capability="x"), raw(b"0", b"stats-dump")),
    "overlay-xattr": _raw(pax(SCHILY__xattr__trusted__overlay__opaque="y"), raw(b"0", b"stats-dump")),
    "acl": _raw(pax(SCHILY__acl__access="user::rwx"), raw(b"0", b"stats-dump")),
    "duplicate": _tar(member("config.dump", b"{}")),
    "duplicate-by-dot": _tar(member("./config.dump", b"{}")),
    "folder-then-file": _tar(member("volumes", type=D), member("volumes", b"x")),
    "pax-path-out": _raw(pax(path="../evil"), raw(b"0", b"stats-dump", 1, data=b"x")),
    "pax-size-lie": _raw(pax(size="99999999"), raw(b"0", b"stats-dump", 1, data=b"x")),
    "pax-size-negative": _raw(pax(size="-1"), raw(b"0", b"stats-dump", 1, data=b"x")),
    "pax-huge": _raw(raw(b"x", b"pax", 1 << 33)),
    "pax-flood": _raw(*[pax(comment="x" * 60000)] * 20, raw(b"0", b"stats-dump")),
    "pax-malformed": _raw(raw(b"x", b"pax", 9, data=b"99 path=a")),
    "pax-global-path": _raw(raw(b"g", b"pax", 18, data=b"18 path=../../evil\n"), raw(b"0", b"stats-dump")),
    "pax-then-end": _raw(pax(path="stats-dump")),
    "gnu-long-name-out": _raw(raw(b"L", b"././@LongLink", 10, data=b"../../evil"), raw(b"0")),
    "gnu-long-link": _raw(raw(b"K", b"././@LongLink", 11, data=b"/etc/shadow"), raw(b"2", b"stats-dump")),
    "gnu-sparse": _raw(raw(b"S", b"stats-dump")),
    "pax-sparse": _raw(pax(GNU__sparse__major="1", GNU__sparse__name="../evil"), raw(b"0", b"stats-dump")),
    "pax-sparse-size": _raw(pax(GNU__sparse__realsize=str(1 << 60)), raw(b"0", b"stats-dump")),
    "huge-size": _raw(raw(b"0", b"stats-dump", 1 << 49)),
    "absurd-size": _raw(raw(b"0", b"stats-dump", (1 << 80) - 1)),
    "negative-size": _raw(
        seal(raw(b"0", b"stats-dump")[:124] + b"-0000000001\0" + raw(b"0", b"stats-dump")[136:])
    ),
    "wrong-checksum": lambda: b"\1" + pack(members_of(whole()))[1:],
    "multi-volume": _raw(raw(b"M", b"stats-dump")),
    "volume-label": _raw(raw(b"V", b"label")),
    "unknown-type": _raw(raw(b"Z", b"stats-dump")),
    "contiguous": _raw(raw(b"7", b"stats-dump", 1, data=b"x")),
    "cut-in-header": lambda: pack(members_of(whole()))[:700],
    "cut-in-data": lambda: pack(members_of(whole()))[: 512 + 10],
    "no-end": _raw(end=b""),
    "behind-the-end": lambda: pack(members_of(whole())) + pack([member("../evil", b"x")]),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(10240),
    "gzip-bomb": _zip_bomb,
    "gzip-in-gzip": lambda: gzip.compress(gzip.compress(pack(members_of(whole())))),
    "gzip-cut": lambda: gzip.compress(pack(members_of(whole())))[:-20],
    "gzip-junk-behind": lambda: gzip.compress(pack(members_of(whole()))) + b"junk" * 9,
    "zstd-window": lambda: b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x01\x00\x00",
    "zstd-skippable-flood": lambda: struct.pack("<II", 0x184D2A50, 0) * 20000,
    "zstd-skippable-huge": lambda: struct.pack("<II", 0x184D2A50, 0xFFFFFFFF) + b"x",
    "zstd-reserved": lambda: b"\x28\xb5\x2f\xfd\x08" + bytes(20),
    "no-inventory": lambda: pack(members_of(whole(checkpoint__inventoryDOTimg=None))),
}


def _mode(info: tarfile.TarInfo, mode: int) -> tarfile.TarInfo:
    info.mode, info.uid, info.gid, info.uname = mode, 4242, 4242, "nobody"
    return info


def _json(name: str, text: str | bytes) -> Callable[[], bytes]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda: pack(members_of({**whole(), name: data}))


def _spec(**changes: Any) -> Callable[[], bytes]:
    return _json("spec.dump", json.dumps({**SPEC, **changes}))


def _config(**changes: Any) -> Callable[[], bytes]:
    return _json("config.dump", json.dumps({**CONFIG, **changes}))


DOCUMENTS: dict[str, Callable[[], bytes]] = {
    "deep-json": _json("config.dump", "[" * 100_000),
    "deep-object": _json("spec.dump", '{"a":' * 500 + "1" + "}" * 500),
    "duplicate-key": _json("config.dump", '{"name": "a", "name": "b"}'),
    "nan": _json("config.dump", '{"name": NaN}'),
    "infinite-number": _json("config.dump", '{"name": 1e999}'),
    "long-number": _json("config.dump", '{"name": ' + "9" * 10_000 + "}"),
    "not-json": _json("config.dump", b"\xff\xfe\0"),
    "lone-surrogate": _json("config.dump", '{"name": "\\ud800"}'),
    "large": _json("config.dump", b'{"name": "' + b"x" * (17 << 20) + b'"}'),
    "list": _json("config.dump", "[]"),
    "null": _json("spec.dump", "null"),
    "numbers-for-texts": _json("config.dump", json.dumps(dict.fromkeys(CONFIG, 7))),
    "objects-for-texts": _json("config.dump", json.dumps({key: {"a": []} for key in CONFIG})),
    "escape-in-name": _config(name=f"a{ESCAPE}b\r\n"),
    "path-for-name": _config(name="../../etc/evil", id="../evil"),
    "option-for-image": _config(rootfsImageName="--root=/", rootfsImageID="-x"),
    "time": _config(checkpointedTime="99999-99-99T99:99:99Z", createdTime="0000-00-00T00:00:00Z"),
    "year-zero": _config(createdTime="0000-01-01T00:00:00Z", checkpointedTime="9999-12-31T23:59:59+14:00"),
    "annotations-list": _spec(annotations=[1, 2]),
    "annotations-numbers": _spec(annotations={"a": 1, "io.container.manager": {"x": 1}}),
    "annotation-escape": _spec(annotations={f"k{ESCAPE}": f"v{ESCAPE}"}),
    "crio-annotation": _spec(
        annotations={"io.container.manager": "cri-o", "io.kubernetes.cri-o.Annotations": "["}
    ),
    "mounts-text": _spec(mounts="x"),
    "mounts-mixed": _spec(mounts=[1, {"type": "bind"}, {"type": "bind", "destination": 7, "source": ["x"]}]),
    "linux-list": _spec(linux=[], process=[], hooks=7, root="x"),
    "namespaces": _spec(linux={"namespaces": [1, {"type": 7, "path": {}}, "x"]}),
    "own-annotations": _json("cryoci.json", '{"version": 1, "annotations": {"a": {"b": 1}}}'),
    "own-annotation-huge": _json(
        "cryoci.json", json.dumps({"version": 1, "annotations": {"a": "x" * (600 << 10)}})
    ),
    "own-engine": _json("cryoci.json", '{"version": 1, "engine": {"a": 1}, "container": [], "criu": "x"}'),
    "deletes-out": _json("deleted.files", '["/../../etc/passwd"]'),
    "deletes-root": _json("deleted.files", '["/", "."]'),
    "deletes-object": _json("deleted.files", "{}"),
    "network": _json("network.status", '{"a": {"interfaces": {"b": {"subnets": {"c": 1}}}}, "d": []}'),
    "rootfs-junk": _json("rootfs-diff.tar", b"junk" * 300),
    "rootfs-whiteout-out": _json("rootfs-diff.tar", gzip.compress(pack([member("../.wh.etc")]))),
    "rootfs-bomb": _json("rootfs-diff.tar", gzip.compress(tar.header("x", 1 << 36) + bytes(1 << 20))),
    "devshm-junk": _json("devshm-checkpoint.tar", b"junk"),
}


def _image(name: str, data: bytes) -> Callable[[], bytes]:
    return lambda: pack(members_of({**whole(), f"checkpoint/{name}": data}))


IMAGES: dict[str, Callable[[], bytes]] = {
    "pstree-junk": _image("pstree.img", b"junk" * 10),
    "pstree-loop": _image("pstree.img", image("pstree", message(f1=1, f2=2), message(f1=2, f2=1))),
    "pstree-self": _image("pstree.img", image("pstree", message(f1=1, f2=1))),
    "pstree-twice": _image("pstree.img", image("pstree", message(f1=1), message(f1=1))),
    "pstree-deep": _image("pstree.img", image("pstree", *(message(f1=i + 1, f2=i) for i in range(400)))),
    "pstree-huge-pid": _image("pstree.img", image("pstree", message(f1=-1, f2=0, f5=[-1] * 1000))),
    "length-lie": _image("pstree.img", image("pstree") + b"\xff\xff\xff\xff"),
    "empty-messages": _image("fdinfo-2.img", image("fdinfo") + bytes(4 * 5_000)),
    "varint-endless": _image("core-1.img", image("core", b"\xff" * 30)),
    "nested": _image("core-1.img", image("core", protobuf.field(3, protobuf.field(6, b"\xff" * 99)))),
    "wrong-kinds": _image("core-1.img", image("core", message(f1="x", f3=7, f4=9))),
    "pagemap-past-the-end": _image(
        "pagemap-1.img", image("pagemap", message(f1=1), message(f1=0x1000, f5=1 << 30, f4=4))
    ),
    "pagemap-wraps": _image(
        "pagemap-1.img", image("pagemap", message(f1=1), message(f1=1 << 63, f5=1 << 52, f4=4))
    ),
    "pagemap-unaligned": _image("pagemap-1.img", image("pagemap", message(f1=1), message(f1=5, f2=1, f4=4))),
    "pages-id": _image(
        "pagemap-1.img", image("pagemap", message(f1=1 << 40), message(f1=0x1000, f2=1, f4=4))
    ),
    "parents-everywhere": _image(
        "pagemap-1.img",
        image("pagemap", message(f1=1), *(message(f1=4096 * i, f2=1, f4=1) for i in range(2000))),
    ),
    "arguments-everywhere": _image(
        "mm-1.img", image("mm", message(f8=0, f9=(1 << 63), f10=5, f11=1, f14=[message(f1=0, f2=1 << 47)]))
    ),
    "area-backwards": _image("mm-1.img", image("mm", message(f14=[message(f1=9, f2=1)]))),
    "sockets": _image("files.img", image("files", message(f1=4, f2=9, f4=message(f3=10, f11=[-1] * 100)))),
    "unix-name": _image(
        "files.img", image("files", message(f1=5, f2=9, f16=message(f11=b"\0\xff\x1b[31m")))
    ),
    "mounts": _image("mountpoints-1.img", image("mountpoints", message(f1=-1, f7=f"./{ESCAPE}" * 100))),
    "host-name": _image("utsns-1.img", image("utsns", message(f1=ESCAPE))),
    "service-magic": _image("inventory.img", image("stats", message(f1=2))),
}
_STATS = {"stats-dump": image("stats", message(f1=message(f1="x")))}
IMAGES["statistics"] = lambda: pack(members_of({**whole(), **_STATS}))


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


BASE = ("--base-image", "localhost/base:1", "--base-id", "cd" * 32)
VERBS: tuple[tuple[str, ...], ...] = (
    ("pull", "REF", "OUT/pulled"),
    ("inspect", "--all", "--env", "--fetch", "REF"),
    ("inspect", "--json", "REF"),
    ("show", "REF"),
    ("diff", "REF", "REF"),
    ("memory", "REF"),
    ("memory", "REF", "--pid", "1", "--strings"),
    *(
        ("convert", "REF", "--to", to, *BASE, "-o", f"OUT/{to}.tar")
        for to in ("crio", "podman", "containerd", "ctr")
    ),
    ("push", "REF", "oci:OUT/layout:1"),
)
TAR_VERBS = (VERBS[0], VERBS[1], VERBS[9], VERBS[-1])  # for what only the reader of a tar sees
IMAGE_VERBS: tuple[tuple[str, ...], ...] = (
    ("copy", "REF", "oci:OUT/copy:1"),
    ("save", "REF", "OUT/saved.tar"),
)
ARCHIVE_VERBS: tuple[tuple[str, ...], ...] = (("load", "REF", "oci:OUT/load:1"), ("ls", "DIR"))


def exercise(
    reference: str,
    sandbox: Path,
    verbs: tuple[tuple[str, ...], ...] = VERBS,
    tally: Counter[str] | None = None,
) -> list[str]:
    """Give `reference` to each verb; everything may be written below `sandbox`/out only.

    Returns what went wrong: escapes, odd files, tracebacks, terminal escapes. The caller bounds the time.
    `tally` counts what was taken and what was refused.
    """
    wrong: list[str] = []
    for verb, *words in verbs:
        out = sandbox / "out"
        out.mkdir()
        before = _outside(sandbox)
        line = [
            w.replace("REF", reference).replace("OUT", str(out)).replace("DIR", str(Path(reference).parent))
            for w in words
        ]
        command: click.Command = importlib.import_module(f"cryoci.cli.{verb}").command
        result = CliRunner().invoke(command, line)
        error = result.exception
        if tally is not None:
            tally[f"{verb} {'refused' if error else 'taken'}"] += 1
        if error is not None and not isinstance(error, (CryociError, SystemExit)):
            wrong.append(f"{verb}: {type(error).__name__}: {error}")
        said = result.output + (str(error) if isinstance(error, CryociError) else "")
        if "\x1b" in said and "--json" not in words:
            wrong.append(f"{verb}: terminal escapes in its output")
        if _outside(sandbox) != before:
            wrong.append(f"{verb}: wrote outside: {sorted(_outside(sandbox) ^ before)[:5]}")
        wrong += [f"{verb}: {problem}" for problem in _odd(out)]
        if error is not None and verb in ("pull", "convert", "save") and any(out.iterdir()):
            wrong.append(f"{verb}: left {sorted(p.name for p in out.iterdir())} after its failure")
        shutil.rmtree(out)
    return wrong


def _outside(sandbox: Path) -> set[str]:
    found = set()
    for folder, names, files in os.walk(sandbox):
        if "out" in names and Path(folder) == sandbox:
            names.remove("out")
        found |= {os.path.join(folder, name) for name in [*names, *files]}
    return found


def _odd(out: Path) -> Iterator[str]:
    for folder, names, files in os.walk(out):
        for name in [*names, *files]:
            path = Path(folder, name)
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                if path.name != "parent" or os.readlink(path) != archive.PARENT_TARGET:
                    yield f"link {path}"
            elif not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
                yield f"special file {path}"
            elif info.st_mode & 0o7077 and path.name != "index.json":
                yield f"mode {info.st_mode:o} of {path}"
            if info.st_uid != os.getuid():
                yield f"owner of {path}"


def write(name: str, data: bytes, directory: Path) -> str:
    """An archive file of that content; returns its path."""
    suffix = (
        ".tar.gz" if data[:2] == b"\x1f\x8b" else ".tar.zst" if data[:1] in (b"\x28", b"\x50") else ".tar"
    )
    path = directory / f"{name}{suffix}"
    path.write_bytes(data)
    return str(path)


def digest(data: bytes) -> str:
    """For reports."""
    return hashlib.sha256(data).hexdigest()[:12]


@contextlib.contextmanager
def environment(directory: Path) -> Iterator[None]:
    """The store, the scratch place and the home of a run, all below `directory`."""
    places = {"CRYOCI_STORE": "store", "TMPDIR": "scratch", "HOME": "home"}
    before = {name: os.environ.get(name) for name in places}
    for name, folder in places.items():
        (directory / folder).mkdir(exist_ok=True)
        os.environ[name] = str(directory / folder)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


__all__ = ["ARCHIVES", "DOCUMENTS", "IMAGES", "LAYOUTS", "PLACES", "criu_images", "exercise"]
