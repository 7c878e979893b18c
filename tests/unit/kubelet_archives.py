# SPDX-License-Identifier: Apache-2.0
"""Archives as a kubelet gets them from CRI-O, containerd and podman, entry by entry as these write them.

Sources: cri-o internal/lib/checkpoint.go (exportCheckpoint) with crutils, containerd
internal/cri/server/container_checkpoint_linux.go, podman libpod/container_internal_common.go. CRI-O's and containerd's
are plain tars whose top is not an entry; folders are entries of their own, files have mode 0600.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

ID, IMAGE_ID, DIGEST = "ab" * 32, "cd" * 32, "sha256:" + "e" * 64
BASE = f"registry.example/app@{DIGEST}"
TIME = "2026-01-02T03:04:05Z"
_CRIU = {
    "checkpoint/inventory.img": b"inventory",
    "checkpoint/core-1.img": b"core",
    "checkpoint/pages-1.img": bytes(range(256)) * 4096,
    "checkpoint/descriptors.json": b'["/dev/null","pipe:[1]","pipe:[2]"]',
    "stats-dump": b"stats",
    "dump.log": b"(00.000000) Version: 4.2 (gitid 0)\n",
}
_TIMES = {
    "createdTime": TIME,
    "checkpointedTime": TIME,
    "restoredTime": "0001-01-01T00:00:00Z",
    "restored": False,
}
_PROCESS = {"args": ["/app"], "cwd": "/"}


def crio(path: Path, **more: bytes) -> Path:
    """CRI-O 1.30's: spec.dump is the bundle's config.json with all of CRI-O's annotations."""
    noted = {
        "io.container.manager": "cri-o",
        "io.kubernetes.container.name": "app",
        "io.kubernetes.pod.name": "web",
        "io.kubernetes.pod.namespace": "shop",
        "io.kubernetes.pod.uid": "6f2d",
        "io.kubernetes.cri-o.Annotations": '{"io.kubernetes.container.restartCount":"0"}',
        "io.kubernetes.cri-o.ContainerID": ID,
        "io.kubernetes.cri-o.ContainerName": "k8s_app_web_shop_6f2d_0",
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.ImageRef": IMAGE_ID,
        "io.kubernetes.cri-o.Labels": '{"io.kubernetes.container.name":"app"}',
        "io.kubernetes.cri-o.LogPath": "/var/log/pods/shop_web_6f2d/app/0.log",
        "io.kubernetes.cri-o.Metadata": '{"name":"app"}',
    }
    config = {
        "id": ID,
        "name": "k8s_app_web_shop_6f2d_0",
        "rootfsImage": "registry.example/app:1",
        "rootfsImageRef": IMAGE_ID,
        "rootfsImageName": BASE,
        "runtime": "cryoci",
        **_TIMES,
    }
    bound = [{"source": "/srv", "destination": "/data", "file_type": "directory", "permissions": 493}]
    files = {
        "bind.mounts": _text(bound),
        **_CRIU,
        "config.dump": _text(config),
        "deleted.files": b'["/etc/old"]',
        "io.kubernetes.cri-o.LogPath": f"{TIME} stdout F count 1\n".encode(),
        "rootfs-diff.tar": _layer({"etc/new": b"new"}),
        "spec.dump": _text({"ociVersion": "1.2.0", "process": _PROCESS, "annotations": noted}),
    }
    return _archive(path, {**files, **more})


def containerd(path: Path, **more: bytes) -> Path:
    """containerd 2.0's: its log, a status of the CRI's, and the root's changes as a gzipped layer."""
    noted = {
        "io.kubernetes.cri.container-name": "app",
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-name": "web",
        "io.kubernetes.cri.sandbox-namespace": "shop",
    }
    config = {
        "id": ID,
        "name": "app",
        "rootfsImage": "registry.example/app:1",
        "rootfsImageRef": BASE,
        "rootfsImageName": "registry.example/app:1",
        "runtime": "io.containerd.runc.v2",
        **_TIMES,
    }
    status = {"id": ID, "metadata": {"name": "app"}, "state": 1, "image_ref": BASE}
    files = {
        **_CRIU,
        "config.dump": json.dumps(config).encode(),
        "container.log": f"{TIME} stdout F count 1\n".encode(),
        "rootfs-diff.tar": gzip.compress(_layer({"etc/.wh.old": b"", "etc/new": b"new"})),
        "spec.dump": json.dumps({"ociVersion": "1.2.0", "process": _PROCESS, "annotations": noted}).encode(),
        "status": b'{"Version":"v1","Pid":0}',
        "status.dump": json.dumps(status).encode(),
    }
    return _archive(path, {**files, **more})


def podman(path: Path, **more: bytes) -> Path:
    """podman's, of a container that `podman kube play` has made."""
    config = {
        "id": ID,
        "name": "web-app",
        "rootfsImageID": IMAGE_ID,
        "rootfsImageName": BASE,
        "runtime": "/usr/bin/crun",
        **_TIMES,
    }
    noted = {"io.container.manager": "libpod", "io.kubernetes.pod.namespace": "shop"}
    files = {
        **_CRIU,
        "config.dump": _text(config),
        "ctr.log": b"count 1\n",
        "network.status": b"{}",
        "spec.dump": _text({"ociVersion": "1.2.0", "process": _PROCESS, "annotations": noted}),
    }
    return _archive(path, {**files, **more})


ENGINES = {"cri-o": crio, "containerd": containerd, "podman": podman}


def gpu_dump(*names: str, driver: str = "580.159.04") -> bytes:
    """gpu.dump of a process that held 1 MiB on each GPU."""
    uuids = [f"GPU-{n:08x}-0000-4000-8000-{n:012x}" for n in range(len(names))]
    gpus = [
        {"uuid": uuid, "name": name, "index": n, "minor": n, "capability": "9.0", "memory": 80 << 30}
        for n, (uuid, name) in enumerate(zip(uuids, names, strict=True))
    ]
    held = dict.fromkeys(uuids, 1 << 20)
    task = {"pid": 7, "start": 99, "inner": 1, "comm": "app", "vram": held}
    value = {"version": 1, "driver": driver, "cuda": 13000, "gpus": gpus, "tasks": [task]}
    return json.dumps(value).encode()


def _archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted({*files, *(f.partition("/")[0] for f in files if "/" in f)}):
            info = tarfile.TarInfo(name)
            info.mtime = 1767323045
            if name in files:
                info.mode, info.size = 0o600, len(files[name])
                tar.addfile(info, io.BytesIO(files[name]))
            else:
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(info)
    return path


def _layer(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def _text(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()
