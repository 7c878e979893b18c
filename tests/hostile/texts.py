# SPDX-License-Identifier: Apache-2.0
"""Good archives of bad content: JSON that lies, and CRIU images that do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

from cryoci import protobuf
from cryoci.ociimage import tar
from tests.hostile.tars import CONFIG, ESCAPE, SPEC, member, members_of, pack, whole
from tests.unit.criu_images import image, message


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
    "pstree-deep": _image("pstree.img", image("pstree", *(message(f1=i + 1, f2=i) for i in range(150)))),
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
