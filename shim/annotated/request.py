# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a container's annotations ask for.

io.cryoci.restore                       a reference (`cryoci --help`), for the container itself
io.cryoci.restore.NAME                  the same, in a pod's annotations, for its container NAME
restore.criu.org/checkpoint-path.NAME   an archive, as checkpoint-restore-operator's PodRestore writes it
"""

from __future__ import annotations

from cryoci.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN = "io.cryoci.restore"
PATH = "restore.criu.org/checkpoint-path."
# What CRI-O (and podman, in pods) and containerd say of a container in its annotations.
_NAMES = ("io.kubernetes.container.name", "io.kubernetes.cri.container-name")
_KINDS = ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri.container-type")
_NAMESPACES = ("io.kubernetes.pod.namespace", "io.kubernetes.cri.sandbox-namespace")


class Request:
    """`reference` names the checkpoint; `key` is the annotation that asked.

    `pod_namespace` is the Kubernetes namespace of the container's pod, None outside of Kubernetes.
    """

    __slots__ = ("key", "pod_namespace", "reference")

    def __init__(self, key: str, reference: str, pod_namespace: str | None) -> None:
        self.key = key
        self.reference = reference
        self.pod_namespace = pod_namespace


def find(annotations: Mapping[str, object]) -> Request | None:
    """What `annotations` ask for, None when nothing, or of a pod's sandbox. Raises UsageError."""
    noted = {key: value for key, value in annotations.items() if isinstance(value, str)}
    if any(noted.get(key) == "sandbox" for key in _KINDS):
        return None  # the engines give it all annotations of its pod
    name = next((noted[key] for key in _NAMES if noted.get(key)), None)
    key = _choose(noted, name)
    if key is None:
        return None
    reference = noted[key]
    if key.startswith(PATH) and not reference.startswith("/"):
        raise UsageError(
            f"annotation {key} is {reference[:200]!r}, not an absolute path",
            hint=f"write the archive's path; for an image use {PLAIN}",
        )
    if not reference or reference.startswith((".", "-")):
        raise UsageError(
            f"annotation {key} is {reference[:200]!r}, which names no checkpoint",
            hint="write HOST/REPO:TAG, HOST/REPO@DIGEST, /DIR, /FILE.tar, or a NAME of the local store",
        )
    return Request(key, reference, next((noted[k] for k in _NAMESPACES if noted.get(k)), None))


def _choose(noted: Mapping[str, str], name: str | None) -> str | None:
    if name is not None:
        ours = (f"{PLAIN}.{name}", PATH + name, PLAIN)
        return next((key for key in ours if key in noted), None)
    if PLAIN in noted:
        return PLAIN
    others = sorted(key for key in noted if key.startswith((PLAIN + ".", PATH)))
    if len(others) > 1:
        raise UsageError(
            f"the container has no name to its engine, and annotations for several: {', '.join(others)}",
            hint=f"write one: {PLAIN}",
        )
    return others[0] if others else None
