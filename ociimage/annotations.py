# SPDX-License-Identifier: Apache-2.0
"""Annotations: the keys by which engines and tools recognise a checkpoint image.

Three families exist and no engine reads another's, so cryoci writes all of them, and `io.cryoci.*` for
what none has. Sources: cri-o internal/annotations/checkpoint.go, podman libpod/define/annotations.go,
checkpointctl lib/annotations.go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cryoci.errors import UsageError

CRIO = "io.kubernetes.cri-o.annotations.checkpoint."
PODMAN = "io.podman.annotations.checkpoint."
CRIU = "org.criu.checkpoint."
CRYOCI = "io.cryoci."

CRIO_NAME = CRIO + "name"  # CRI-O: its presence makes an image a checkpoint
PODMAN_RUNTIME = PODMAN + "runtime.name"  # podman: must equal the name of the runtime that restores
CRIU_CONTAINER = CRIU + "container.name"  # containerd: its presence, on manifest or index

FORMAT = CRYOCI + "format"  # version of the checkpoint directory model; "1"
RAW_SIZE = CRYOCI + "raw-size"  # bytes of the checkpoint before compression
CONTAINER_ID = CRYOCI + "container.id"  # full id of the container on its first node
CHECKPOINTED = CRYOCI + "checkpointed"  # RFC 3339 time of the dump
LAYER_KIND = CRYOCI + "layer"  # on a layer: "metadata", or the name of the one file it holds
LAYER_RAW_SIZE = CRYOCI + "layer.raw-size"  # on a layer: bytes of its tar
LAYER_CHUNKS = (
    CRYOCI + "layer.chunks"
)  # on a layer of memory: PID-START:SHA256 of each chunk file, by commas

PIN = CRYOCI + "pin"  # on an entry of a layout's index.json: retention leaves the name alone

REF_NAME = "org.opencontainers.image.ref.name"  # OCI layout: the name of an image in index.json
CREATED = "org.opencontainers.image.created"  # RFC 3339
ZSTD = "io.github.containers.compression.zstd"  # on an index's descriptor: "true" (containers/image)
TITLE = "org.opencontainers.image.title"  # what registries' web pages show

# fact -> the keys that carry it. `criu.version` is "4.1.1" here; podman's key wants 40101.
FACTS: dict[str, tuple[str, ...]] = {
    "engine.name": (CRIU + "engine.name", CRYOCI + "engine.name"),  # podman, cri-o, containerd, runc, crun
    "engine.version": (CRIU + "engine.version",),
    "container.name": (CRIO_NAME, PODMAN + "name", CRIU_CONTAINER),  # name the container had
    "container.id": (CONTAINER_ID,),
    "pod.name": (CRIU + "pod.name",),  # Kubernetes pod
    "pod.namespace": (CRIU + "pod.namespace",),
    "pod.id": (CRIU + "pod.id",),
    "image.name": (
        CRIO + "rootfsImageName",
        PODMAN + "rootfsImageName",
        CRIU + "rootfsImageName",
    ),  # base image
    "image.id": (
        CRIO + "rootfsImageID",
        PODMAN + "rootfsImageID",
        CRIU + "rootfsImageID",
    ),  # engine-local id
    "image.digest": (
        CRIU + "rootfsImageSha",
        CRYOCI + "image.digest",
    ),  # manifest digest: finds it on other nodes
    "image.requested": (CRIU + "rootfsImageUserRequested",),  # as the user typed it
    "image.raw": (CRIO + "rawImageName", PODMAN + "rawImageName", CRIU + "rawImageName"),  # unprocessed
    "runtime.name": (PODMAN_RUNTIME, CRIU + "runtime.name"),  # the OCI runtime under cryoci
    "runtime.version": (PODMAN + "runtime.version", CRIU + "runtime.version"),
    "criu.version": (CRIO + "criu.version", PODMAN + "criu.version", CRIU + "criu.version"),
    "conmon.version": (PODMAN + "conmon.version", CRIU + "conmon.version"),
    "host.arch": (PODMAN + "host.arch", CRIU + "host.arch"),
    "host.kernel": (PODMAN + "host.kernel", CRIU + "host.kernel", CRYOCI + "host.kernel"),
    "cgroup.version": (PODMAN + "cgroups.version", CRIU + "cgroup.version"),  # v1 or v2; podman says cgroups
    "distribution.name": (PODMAN + "distribution.name", CRIU + "distribution.name"),
    "distribution.version": (PODMAN + "distribution.version", CRIU + "distribution.version"),
    "checkpointed": (CHECKPOINTED,),
}
_ENGINE_VERSION = {"podman": PODMAN + "podman.version", "cri-o": CRIO + "cri-o.version"}
_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,253}[A-Za-z0-9])?\Z")
MAX_VALUE = 64 << 10  # bytes
MAX_TOTAL = 512 << 10  # bytes; manifest and index both carry all, and registries cap a manifest at 4 MiB


def build(facts: Mapping[str, str]) -> dict[str, str]:
    """All families' annotations of `facts`.

    A key of FACTS goes to every family that knows it; any other becomes `io.cryoci.KEY`, unless it is a full
    key already (of a known family, or org.opencontainers.image.*). Empty values are left out. Raises
    UsageError for a key or value that no registry would take.
    """
    result: dict[str, str] = {FORMAT: "1"}
    for fact in sorted(facts):
        value = facts[fact]
        if not value:
            continue
        for key in keys_of(fact):
            result[key] = value
    if (version := facts.get("criu.version")) and (number := criu_number(version)):
        result[PODMAN + "criu.version"] = number
    engine = facts.get("engine.name", "").lower()
    if (version := facts.get("engine.version")) and engine in _ENGINE_VERSION:
        result[_ENGINE_VERSION[engine]] = version
    # a key that an engine requires must be there even when the checkpoint was made without that engine
    name = facts.get("container.name") or facts.get("container.id") or "checkpoint"
    for key in FACTS["container.name"]:
        result.setdefault(key, name)
    check(result)
    return result


def keys_of(fact: str) -> tuple[str, ...]:
    """The annotation keys that carry `fact`."""
    if fact in FACTS:
        return FACTS[fact]
    known = (CRIO, PODMAN, CRIU, CRYOCI, "org.opencontainers.image.")
    return (fact,) if fact.startswith(known) else (CRYOCI + fact,)


def read(annotations: Mapping[str, str]) -> dict[str, str]:
    """The facts that `annotations` of any family hold: the inverse of `build`, for images of any maker."""
    facts = {}
    for fact, keys in FACTS.items():
        # the last family's form is the plainest ("4.1.1" rather than 40101)
        values = [annotations[key] for key in reversed(keys) if annotations.get(key)]
        if values:
            facts[fact] = values[0]
    return facts


def check(annotations: Mapping[str, str]) -> None:
    """Raise UsageError unless every key and value is fit for a manifest."""
    total = 0
    for key, value in annotations.items():
        if not _KEY.match(key):
            raise UsageError(
                f"bad annotation key {key[:100]!r}", hint="use reverse-DNS keys: com.example.key=value"
            )
        if len(value.encode()) > MAX_VALUE or "\0" in value:
            raise UsageError(f"the value of annotation {key} is over {MAX_VALUE} bytes or holds a NUL")
        total += len(key) + len(value.encode())
    if total > MAX_TOTAL:
        raise UsageError(f"annotations take {total} bytes; at most {MAX_TOTAL} fit a manifest")


def is_checkpoint(annotations: Mapping[str, str]) -> bool:
    """Whether any family marks these annotations as a checkpoint's."""
    return any(annotations.get(key) for key in (CRIO_NAME, PODMAN_RUNTIME, CRIU_CONTAINER, FORMAT))


def criu_number(version: str) -> str | None:
    """CRIU's version as podman and CRI-O write it: "4.1.1" is "40101"; None when it is not one."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if not match:
        return None
    return str(int(match[1]) * 10000 + int(match[2]) * 100 + int(match[3] or 0))


def number(text: str | None) -> int | None:
    """A size in an annotation; None when it is none."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 18 else None
