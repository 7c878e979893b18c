# SPDX-License-Identifier: Apache-2.0
"""The counter as a root file system, an OCI image and a bundle, made offline from the node tree's own files.

`layer()` is one more lower directory of every node, so each sees /opt/workload/rootfs and
/opt/workload/counter.tar (an oci-archive) without a copy. The image is byte for byte the same for the same tree.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import inspect
import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any, Literal

from tests.nodes import tree
from tests.nodes.node import Node

IMAGE = "localhost/cryoci-counter:1"
PORT = 8765
COMMAND = ("python3", "-u", "/app/counter.py")
SOURCE = Path(__file__).with_name("counter.py")
ARCHIVE = "/opt/workload/counter.tar"
ROOTFS = "/opt/workload/rootfs"
# The python of the container: its packages' files, without what a counter never imports.
_PACKAGES = (
    "base-files", "coreutils", "dash", "libacl1", "libattr1", "libc6", "libcap2", "libexpat1", "libffi8",
    "libgmp10",
    "libpcre2-8-0", "libselinux1", "libssl3t64", "libzstd1", "python3.13-minimal", "zlib1g",
)  # fmt: skip
_SKIP = (
    "/usr/share/",
    "/usr/lib/x86_64-linux-gnu/gconv/",
    "/usr/lib/x86_64-linux-gnu/ossl-modules/",
    "/var/",
    "/home",
)
_STDLIB = "python3.13"
_SKIP_PYTHON = (
    "test",
    "idlelib",
    "ensurepip",
    "pydoc_data",
    "turtledemo",
    "tkinter",
    "lib2to3",
    "config-*",
    "venv",
)


def rootfs(destination: Path) -> None:
    """Make the container's root directory at `destination` (54 MB): python3, sh, coreutils, counter.py."""
    base = tree.debian()
    destination.mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (destination / "usr" / name).mkdir(parents=True)
        (destination / name).symlink_to(f"usr/{name}")
    for name in ("proc", "sys", "dev", "run", "tmp", "etc", "data", "app", "root", "var/tmp"):
        (destination / name).mkdir(parents=True, exist_ok=True)
    (destination / "tmp").chmod(0o1777)
    for package in _PACKAGES:
        for path in _listed(base, package):
            source, target = base / path.lstrip("/"), destination / path.lstrip("/")
            if path.startswith(_SKIP) or target.is_symlink() or target.exists():
                continue
            if source.is_dir() and not source.is_symlink():
                target.mkdir(parents=True, exist_ok=True)
            elif source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
    library = destination / "usr/lib/python3.13"
    shutil.rmtree(library, ignore_errors=True)
    shutil.copytree(
        base / "usr/lib/python3.13", library, symlinks=True, ignore=shutil.ignore_patterns(*_SKIP_PYTHON)
    )
    (destination / "usr/bin/python3").symlink_to("python3.13")
    for name in ("passwd", "group", "ld.so.cache", "ld.so.conf"):
        shutil.copy(base / "etc" / name, destination / "etc" / name)
    shutil.copy(SOURCE, destination / "app" / "counter.py")


def image(root: Path, archive: Path) -> None:
    """Write `root` as an oci-archive (image-spec 1.1 layout in a tar) with one gzip layer."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            info = tar.gettarinfo(path, arcname=str(path.relative_to(root)))
            info.uid = info.gid = 0
            # those of Python's library are its package's; with another Python would compile it at each start
            info.mtime = int(info.mtime) if path.suffix == ".py" and _STDLIB in path.parts else 0
            info.uname = info.gname = ""
            with path.open("rb") if info.isreg() else io.BytesIO() as f:
                tar.addfile(info, f)
    layer = gzip.compress(plain.getvalue(), compresslevel=1, mtime=0)
    diff = hashlib.sha256(plain.getvalue()).hexdigest()
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "created": "2025-01-01T00:00:00Z",
        "config": {"Cmd": COMMAND, "Env": ["PATH=/usr/bin:/bin", "LANG=C.UTF-8"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff}"]},
        "history": [{"created": "2025-01-01T00:00:00Z", "created_by": "cryoci tests"}],
    }).encode()  # fmt: skip
    blobs: dict[str, bytes] = {}
    kind = "application/vnd.oci.image."

    def add(media: str, data: bytes, **more: object) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": kind + media, "digest": f"sha256:{digest}", "size": len(data), **more}

    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{kind}manifest.v1+json", "config": add("config.v1+json", config),
        "layers": [add("layer.v1.tar+gzip", layer)],
    }).encode()  # fmt: skip
    index = {
        "schemaVersion": 2,
        "manifests": [
            add("manifest.v1+json", manifest, annotations={"org.opencontainers.image.ref.name": IMAGE}),
        ],
    }
    blobs["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    blobs["index.json"] = json.dumps(index).encode()
    with tarfile.open(archive, "w") as tar:
        for name, data in sorted(blobs.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@functools.cache
def layer() -> Path:
    """The overlay layer with /opt/workload, cached by the tree and the counter's source."""
    recipe = inspect.getsource(rootfs) + inspect.getsource(image)
    words = [*_PACKAGES, *_SKIP, *_SKIP_PYTHON, *COMMAND]
    key = tree.digest([tree.debian().name, SOURCE.read_text(), recipe, *words])

    def build(path: Path) -> None:
        rootfs(path / ROOTFS.lstrip("/"))
        image(path / ROOTFS.lstrip("/"), path / ARCHIVE.lstrip("/"))

    return tree.cached(f"workload-{key}", build)


def lower() -> tuple[Path, ...]:
    """The read-only layers of a node, topmost first; what is missing of them is built."""
    return (layer(), *tree.lower())


def load(node: Node) -> None:
    """Put the image `localhost/cryoci-counter:1` into the node's podman storage (a second or so)."""
    node.run(["skopeo", "copy", "-q", f"oci-archive:{ARCHIVE}", f"containers-storage:{IMAGE}"])


def push(node: Node, reference: str) -> None:
    """Push the image from a node to a plain HTTP registry: reference like "10.77.0.2:5000/counter:1"."""
    node.run(
        [
            "skopeo",
            "copy",
            "-q",
            "--dest-tls-verify=false",
            f"oci-archive:{ARCHIVE}",
            f"docker://{reference}",
        ]
    )


def bundle(
    node: Node,
    destination: str,
    *,
    args: tuple[str, ...] = (),
    rw: Literal["dir", "overlay"] = "dir",
    network: bool = False,
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Make a bundle of the counter at `destination` in a node; return its config.json as written.

    Below /srv storage is a plain file system, as an overlay's upper directory must be. `rw` is a private
    copy of the root, or an overlay over a shared one; with `network` the container gets its own (empty)
    network namespace, else it shares the node's. `args` are added to the counter's. Start it by `detach`.
    """
    base = "/srv/workload-rootfs"
    script = f"""
        [ -d {base} ] || {{ cp -a {ROOTFS} {base}.$$ && mv -T {base}.$$ {base}; }}
        mkdir -p "$1/rootfs" && cd "$1"
        if [ {rw} = overlay ]; then
            mkdir -p upper work
            mount -t overlay overlay -o "lowerdir={base},upperdir=$1/upper,workdir=$1/work" rootfs
        else
            cp -a {base}/. rootfs
        fi
        runc spec && cat config.json
    """
    result = node.run(["/bin/sh", "-euc", script, "sh", destination])
    config: dict[str, Any] = json.loads(result.stdout)
    config["process"].update(terminal=False, args=[*COMMAND, *args], noNewPrivileges=True)
    config["process"]["env"].append("LANG=C.UTF-8")
    config["root"]["readonly"] = False
    config["hostname"] = os.path.basename(destination)
    linux = config["linux"]
    linux.pop("resources", None)  # cgroup2 may have no controllers in a node
    linux["cgroupsPath"] = f"/{os.path.basename(destination)}"
    if not network:
        linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "network"]
    if annotations:
        config["annotations"] = annotations
    node.write(f"{destination}/config.json", json.dumps(config, indent=1))
    return config


def detach(node: Node, argv: list[str], log: str) -> None:
    """Run a runtime's `run -d` or `restore -d` with stdio that CRIU can dump. Raises NodeError.

    CRIU knows pipes, and files of the container; a log file (or a FIFO) elsewhere in the node it refuses
    ("Can't lookup mount"). So the container writes into an anonymous pipe that a `cat` appends to `log`.
    """
    script = """
        log=$1; shift
        status=$(mktemp /run/status.XXXXXX)
        {
            { "$@" 2>&1 && echo 0 >"$status" || echo $? >"$status"; } | setsid cat >>"$log"
        } </dev/null >/dev/null 2>&1 &
        while [ ! -s "$status" ]; do sleep 0.02; done
        code=$(cat "$status")
        rm "$status"
        [ "$code" = 0 ] || { sleep 0.1; cat "$log" >&2; exit "$code"; }
    """
    node.run(["/bin/sh", "-euc", script, "sh", log, *argv])


# Over a bare socket: to import urllib.request takes three times as long as all else here, and tests ask often.
_ASK = """
import socket, sys
host, port, path = sys.argv[1:]
try:
    with socket.create_connection((host, int(port)), 5) as s:
        s.sendall(f"GET {path} HTTP/1.0\\r\\n\\r\\n".encode())
        said = b"".join(iter(lambda: s.recv(65536), b""))
except OSError as e:
    sys.exit(f"{host}:{port}{path}: {e}")
head, _, body = said.decode().partition("\\r\\n\\r\\n")
if " 200 " not in head.partition("\\r\\n")[0] or not body.endswith("\\n"):
    sys.exit(f"{host}:{port}{path}: {said}")
print(body)
"""


def ask(
    node: Node, path: str = "/", *, host: str = "127.0.0.1", port: int = PORT, pid: int | None = None
) -> dict[str, Any]:
    """Ask a counter from inside a node; `pid` (in the node) names the network namespace to ask from."""
    enter = [] if pid is None else ["nsenter", "-t", str(pid), "-n"]
    result = node.run([*enter, "python3", "-ISc", _ASK, host, str(port), path], timeout=20)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def wait(
    node: Node,
    count: int = 1,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    pid: int | None = None,
    timeout: float = 20,
) -> dict[str, Any]:
    """Ask until the counter has reached `count`; return that state. Raises after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        try:
            state = ask(node, host=host, port=port, pid=pid)
            if state["count"] >= count:
                return state
        except AssertionError:
            if time.monotonic() > end:
                raise
        if time.monotonic() > end:
            raise AssertionError(f"the counter did not reach {count} within {timeout:g} s")
        time.sleep(0.05)


def _listed(base: Path, package: str) -> list[str]:
    """Paths of an installed package of the tree."""
    for name in (package, f"{package}:amd64", f"{package}:arm64"):
        path = base / "var/lib/dpkg/info" / f"{name}.list"
        if path.is_file():
            return [p for p in path.read_text().splitlines() if p != "/."]
    raise LookupError(f"package {package} is not in the node tree")
