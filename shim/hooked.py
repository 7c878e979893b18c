# SPDX-License-Identifier: Apache-2.0
"""What the OCI hook has noted of a container whose runtime may not be cryoci-runtime: its GPUs, CDI, base image.

/run/cryoci/hooked/ID.json, private to root; written at createRuntime (or prestart), removed at poststop. A later
`cryoci checkpoint` takes its facts into the image. runc runs createRuntime and prestart again on restore, before any
mount of the container exists, and crun runs none: so a note is made from the bundle alone, and may be missing.
"""

from __future__ import annotations

import json
import time

from cryoci.shim import paths, state

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
    """Remove the note of a container that is gone. Never raises."""
    where = path(str(seen.get("id", "")))
    if where is not None:
        state.unlink(where)


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
