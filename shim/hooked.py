# SPDX-License-Identifier: Apache-2.0
"""What the OCI hook has noted of a container whose runtime may not be cryoci-runtime: its GPUs, CDI, base image.

/run/cryoci/hooked/ID.json, private to root; written at createRuntime (or prestart), removed at poststop. A later
`cryoci checkpoint` takes its facts into the image. runc runs createRuntime and prestart again on restore, before any
mount of the container exists, and crun runs none: so a note is made from the bundle alone, and may be missing.
"""

from __future__ import annotations

import json
import posix
import time

from cryoci.shim import paths, remains, state

TYPE_CHECKING = False  # `typing` would cost the hook 3 ms
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
_LIMIT = 16 << 20  # bytes of config.json
# where engines write the base image: CRI-O (by digest), containerd's CRI plugin
_IMAGES = (
    "io.kubernetes.cri-o.ImageRef",
    "io.kubernetes.cri-o.ImageName",
    "io.kubernetes.cri.image-name",
    "org.opencontainers.image.base.digest",
)
_JOURNALS = ("held.json", "memory.json")  # beside what remains.remove knows
_GPU = ("/dev/nvidia", "/dev/kfd", "/dev/dri/renderD")


def path(container: str) -> str | None:
    """Where a container's note is; None for what is no container id."""
    return f"{paths.run_directory()}/hooked/{container}.json" if paths.valid_id(container) else None


def note(seen: dict[str, Any], stage: str) -> None:
    """Write the note of the container whose state an OCI runtime gave to its hook.

    Raises OSError, ValueError (the bundle is not what it should be).
    """
    container, bundle = str(seen.get("id", "")), str(seen.get("bundle", ""))
    where = path(container)
    raw = paths.read(bundle + "/config.json", _LIMIT) if bundle[:1] == "/" else None
    if where is None or raw is None:
        raise ValueError(f"container {container!r} with bundle {bundle!r} cannot be noted")
    spec = json.loads(raw)
    annotations = spec.get("annotations") or {}
    value = {
        "version": VERSION,
        "id": container,
        "stage": stage,
        "bundle": bundle,
        "pid": seen.get("pid"),
        "gpus": [
            d["path"] for d in (spec.get("linux") or {}).get("devices") or [] if d["path"].startswith(_GPU)
        ],
        "cdi": [v for k, v in sorted(annotations.items()) if k.startswith("cdi.k8s.io/")],
        "visible": [
            e
            for e in (spec.get("process") or {}).get("env") or []
            if e.startswith("NVIDIA_VISIBLE_DEVICES=")
        ],
        "driver": (paths.read("/sys/module/nvidia/version", 64) or b"").decode(errors="replace").strip(),
        "image": {k: annotations[k] for k in _IMAGES if k in annotations},
        "noted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    state.make_directory(where.rpartition("/")[0])
    state.write(where, json.dumps(value, indent=1).encode() + b"\n")


def forget(seen: dict[str, Any]) -> None:
    """Remove the note of a container that is gone, and what checkpoints of it left. Never raises.

    A container of cryoci-runtime keeps its record here: `delete` removes it, after the runtime has deleted.
    """
    container = str(seen.get("id", ""))
    where = path(container)
    if where is None:
        return
    state.unlink(where)
    for directory in remains.directories():
        if directory.rpartition("/")[2] == container and not posix.access(
            directory + "/runtime", posix.F_OK
        ):
            _settle(directory)


def _settle(directory: str) -> None:
    """Journals of operations on a container that was not cryoci-runtime's; CRIU's logs stay."""
    import fcntl

    try:  # as engines/processes.py: who works on the container holds it, and may bring it back to life
        fd = posix.open(directory + "/checkpoint.lock", posix.O_RDWR | posix.O_NOFOLLOW | posix.O_CLOEXEC)
    except FileNotFoundError:
        fd = -1
    except OSError:
        return
    try:
        if fd >= 0:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state.unlink(directory + "/checkpoint.lock")
        for name in _JOURNALS:
            state.unlink(f"{directory}/{name}")
        remains.remove(directory)
    except OSError:
        pass  # it is at work: what is left goes when that ends
    finally:
        if fd >= 0:
            posix.close(fd)


def facts(container: str) -> dict[str, str]:
    """What the note says, named as in docs/format.md; {} when there is none."""
    where = path(container)
    raw = paths.read(where) if where is not None else None
    try:
        value = json.loads(raw or b"{}")
        found = {
            "gpu.devices": ",".join(map(str, value.get("gpus", []))),
            "gpu.cdi": ",".join(map(str, value.get("cdi", []))),
            "gpu.driver": str(value.get("driver", "")) if value.get("gpus") else "",
        }
        reference = str(value.get("image", {}).get(_IMAGES[0], ""))
    except (ValueError, AttributeError, TypeError):
        return {}
    digest = reference.rpartition("@")[2]
    if digest.startswith("sha256:"):
        found["image.digest"] = digest
    return {key: text for key, text in found.items() if text}
