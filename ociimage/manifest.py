# SPDX-License-Identifier: Apache-2.0
"""Descriptors, manifests, indexes and configs of OCI images (image-spec v1.1): built and strictly read.

Everything built here is byte-for-byte reproducible, and what Go programs would write for the same content.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryoci.errors import ImageError
from cryoci.ociimage import strictjson

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
ENCRYPTED = "+encrypted"  # suffix of an encrypted layer's type (ocicrypt)
INDEX_TYPES = (INDEX, DOCKER_LIST)
MANIFEST_TYPES = (MANIFEST, DOCKER_MANIFEST)
LAYER_TYPES = (LAYER_TAR, LAYER_GZIP, LAYER_ZSTD, DOCKER_LAYER_GZIP)

MAX_MANIFEST = (
    4 << 20
)  # bytes; the limit registries themselves keep (distribution-spec, "Pushing Manifests")
MAX_CONFIG = 8 << 20
MAX_LAYERS = 512
MAX_BLOB = 1 << 44  # 16 TiB
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "riscv64": "riscv64",
}


def digest_of(data: bytes) -> str:
    """`sha256:<hex>` of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def goarch(machine: str | None = None) -> str:
    """The OCI (Go) name of a machine as uname(2) gives it; this host by default."""
    machine = machine or platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def rfc3339(when: datetime) -> str:
    """`when` in UTC with whole seconds, as image-spec wants it; a naive time is taken as UTC."""
    aware = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return aware.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Descriptor:
    """A typed, digested, sized pointer to bytes (image-spec descriptor.md); `size` in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this descriptor."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            value["annotations"] = dict(sorted(self.annotations.items()))
        if self.platform:
            value["platform"] = dict(sorted(self.platform.items()))
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        return value

    @staticmethod
    def parse(value: Any, what: str) -> Descriptor:
        """Read a descriptor. Raises ImageError when a field is missing, of a wrong type, or absurd."""
        if not isinstance(value, dict):
            raise ImageError(f"{what} is not a descriptor")
        media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(media_type, str) or not media_type:
            raise ImageError(f"{what} has no mediaType")
        if not isinstance(digest, str) or not _DIGEST.match(digest):
            raise ImageError(f"{what} has digest {str(digest)[:100]!r}; only sha256 is accepted")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB:
            raise ImageError(f"{what} has size {size!r}")
        return Descriptor(
            media_type,
            digest,
            size,
            _strings(value.get("annotations"), f"{what}: annotations"),
            {
                k: v
                for k, v in _object(value.get("platform"), f"{what}: platform").items()
                if isinstance(v, str)
            },
            str(value.get("artifactType") or ""),
        )


@dataclass(frozen=True)
class Manifest:
    """An image manifest: one config, layers from the base up."""

    config: Descriptor
    layers: Sequence[Descriptor]
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The manifest's bytes; no artifactType, so that engines store it as an image."""
        return dump(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": self.config.to_json(),
                "layers": [layer.to_json() for layer in self.layers],
                "annotations": dict(sorted(self.annotations.items())),
            }
        )

    @staticmethod
    def parse(data: bytes) -> Manifest:
        """Read an OCI or Docker schema 2 image manifest. Raises ImageError."""
        value = _document(data, "image manifest", MANIFEST_TYPES)
        layers = value.get("layers")
        if not isinstance(layers, list) or not 0 < len(layers) <= MAX_LAYERS:
            raise ImageError("image manifest has no layers, or too many")
        config = Descriptor.parse(value.get("config"), "image manifest: config")
        if config.size > MAX_CONFIG:
            raise ImageError(f"image config is {config.size} bytes; at most {MAX_CONFIG} are accepted")
        return Manifest(
            config,
            [Descriptor.parse(layer, f"image manifest: layer {i}") for i, layer in enumerate(layers)],
            _strings(value.get("annotations"), "image manifest: annotations"),
        )


@dataclass(frozen=True)
class Index:
    """An image index: manifests by platform."""

    manifests: Sequence[Descriptor]
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The index's bytes."""
        return dump(
            {
                "schemaVersion": 2,
                "mediaType": INDEX,
                "manifests": [m.to_json() for m in self.manifests],
                **({"annotations": dict(sorted(self.annotations.items()))} if self.annotations else {}),
            }
        )

    @staticmethod
    def parse(data: bytes) -> Index:
        """Read an OCI index or Docker manifest list. Raises ImageError."""
        value = _document(data, "image index", INDEX_TYPES)
        manifests = value.get("manifests")
        if not isinstance(manifests, list) or len(manifests) > 4096:
            raise ImageError("image index has no list of manifests, or too long a one")
        return Index(
            [Descriptor.parse(m, f"image index: manifest {i}") for i, m in enumerate(manifests)],
            _strings(value.get("annotations"), "image index: annotations"),
        )

    def select(self, architecture: str) -> Descriptor:
        """The one image manifest for linux on `architecture`, or the only one. Raises ImageError."""
        images = [m for m in self.manifests if m.media_type in MANIFEST_TYPES]
        fitting = [m for m in images if m.platform.get("architecture") == architecture]
        if fitting:
            return fitting[0]
        if len(images) == 1:
            return images[0]
        have = ", ".join(sorted(m.platform.get("architecture", "?") for m in images)) or "none"
        raise ImageError(f"the index has no image for {architecture} (it has: {have})")


@dataclass(frozen=True)
class ImageConfig:
    """An image config (image-spec config.md); `created` is RFC 3339, `history` one line per layer."""

    architecture: str
    created: str
    diff_ids: Sequence[str]
    history: Sequence[str] = ()
    os: str = "linux"

    def to_bytes(self) -> bytes:
        """The config's bytes."""
        return dump(
            {
                "created": self.created,
                "architecture": self.architecture,
                "os": self.os,
                "config": {},
                "rootfs": {"type": "layers", "diff_ids": list(self.diff_ids)},
                "history": [{"created": self.created, "created_by": line} for line in self.history],
            }
        )

    @staticmethod
    def parse(data: bytes) -> ImageConfig:
        """Read an image config. Raises ImageError."""
        value = strictjson.load_object(data, "image config", limit=MAX_CONFIG)
        rootfs = _object(value.get("rootfs"), "image config: rootfs")
        diff_ids = rootfs.get("diff_ids")
        if not isinstance(diff_ids, list) or not all(
            isinstance(d, str) and _DIGEST.match(d) for d in diff_ids
        ):
            raise ImageError("image config has no list of sha256 diff_ids")
        architecture, system = value.get("architecture"), value.get("os")
        if not isinstance(architecture, str) or system != "linux":
            raise ImageError(f"image config is for {system!r} on {architecture!r}")
        created = value.get("created")
        return ImageConfig(architecture, created if isinstance(created, str) else "", diff_ids)


def _document(data: bytes, what: str, types: tuple[str, ...]) -> dict[str, Any]:
    value = strictjson.load_object(data, what, limit=MAX_MANIFEST)
    if value.get("schemaVersion") != 2:
        raise ImageError(f"{what} has schemaVersion {value.get('schemaVersion')!r}, not 2")
    # image-spec: a document that could be read as either kind must be refused (CVE-2021-41190)
    if value.get("mediaType", types[0]) not in types or ("layers" in value and "manifests" in value):
        raise ImageError(f"{what} is of another type: {str(value.get('mediaType'))[:100]!r}")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not an object")
    return value


def _strings(value: Any, what: str) -> dict[str, str]:
    items = _object(value, what)
    for key, text in items.items():
        if not isinstance(text, str):
            raise ImageError(f"{what}: {key[:100]!r} is not a string")
    return items


def dump(value: dict[str, Any]) -> bytes:
    """As Go's encoding/json writes it, fields in the order of image-spec's Go types.

    containers/image compares an index with its own rendering, and refuses to copy one that differs when it
    is to preserve digests (copy/multiple.go).
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode()
