# SPDX-License-Identifier: Apache-2.0
"""The buildah backend: the same image through containers-storage, for sites whose policy asks for that.

from scratch, add, config, commit, push. It needs root, three times the space and ten times the time of the one pass
in pack.py (docs/benchmarks/push.md); the image has one layer and no index. A pull gives the same files.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from cryoci.errors import ToolError, UsageError
from cryoci.ociimage import archive, layers, pack, stores, transport
from cryoci.ociimage.reference import STORAGE, LayoutRef, RegistryRef
from cryoci.ociimage.shell import Program
from cryoci.ociimage.transport import RegistryOptions

_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/-]{0,254}\Z")
_HINT = "the backend of cryoci itself needs no buildah: leave out --backend"


def push(
    directory: Path,
    ref: LayoutRef | RegistryRef,
    *,
    annotations: Mapping[str, str] | None = None,
    compression: str = "zstd:1",
    created: datetime | None = None,
    registry_options: RegistryOptions | None = None,
) -> pack.PackResult:
    """As `pack.push`. Raises ToolError with buildah's own words; then nothing of it is left in its storage."""
    began = time.monotonic()
    options = registry_options or RegistryOptions()
    name = stores.target_name(ref)
    checkpoint = archive.validate(directory)
    noted = pack.annotations_of(checkpoint, annotations or {}, created)
    words = [*_compression(compression), *_transport(ref, options), "--quiet"]
    store = stores.open_store(ref, options, create=True)
    buildah = Program("buildah")
    image = f"localhost/cryoci-{secrets.token_hex(6)}"
    place = (
        f"docker://{ref.host}/{ref.repository}:{name}"
        if isinstance(ref, RegistryRef)
        else f"oci:{ref.path}:{name}"
    )
    try:
        _commit(buildah, directory, noted, image)
        with store.session():
            buildah(["push", *words, image, place], hint=_HINT)
    finally:
        _leave(buildah, ["rmi", "--force", image])
    found = stores.resolve(store, name)
    size = found.manifest.config.size + sum(layer.size for layer in found.manifest.layers)
    return pack.PackResult(
        found.top.digest,
        found.manifest_digest,
        size + len(found.manifest_bytes),
        checkpoint.size,
        time.monotonic() - began,
        str(ref),
        0,
    )


def build(
    directory: Path,
    image: str,
    *,
    annotations: Mapping[str, str] | None = None,
    created: datetime | None = None,
) -> pack.PackResult:
    """Make the image `image` of containers-storage, which podman and CRI-O of this node restore without a registry.

    Raises UsageError for a bad name, ToolError with buildah's own words; then nothing of it is left.
    """
    began = time.monotonic()
    if not _IMAGE.match(image):
        raise UsageError(f"bad image name {image!r}", hint=f"write {STORAGE}localhost/NAME:TAG")
    checkpoint = archive.validate(directory)
    noted = pack.annotations_of(checkpoint, annotations or {}, created)
    buildah = Program("buildah")
    _commit(buildah, directory, noted, image)
    digest = buildah(["inspect", "--type=image", "--format={{.FromImageDigest}}", image])
    return pack.PackResult(
        digest, digest, checkpoint.size, checkpoint.size, time.monotonic() - began, f"{STORAGE}{image}", 0
    )


def _commit(buildah: Program, directory: Path, noted: Mapping[str, str], image: str) -> None:
    container = buildah(["from", "scratch"], hint=_HINT)
    try:
        buildah(["add", "--quiet", container, f"{directory}/", "/"], hint=_HINT)
        flags = [f"--annotation={key}={value}" for key, value in sorted(noted.items())]
        buildah(["config", *flags, container], hint=_HINT)
        buildah(["commit", "--quiet", container, image], hint=_HINT)
    finally:
        _leave(buildah, ["rm", container])


def _leave(buildah: Program, words: list[str]) -> None:
    try:
        buildah(words)
    except ToolError:
        pass  # the failure before this one is the one to tell; the image may not be there yet


def _compression(text: str) -> list[str]:
    wanted = layers.Compression.parse(text)
    if wanted.codec == "none":
        return ["--disable-compression"]
    if not wanted.level > 0:
        raise UsageError(
            f"buildah has no compression {text}", hint="use zstd:1 to zstd:19, gzip:1 to gzip:9"
        )
    return [f"--compression-format={wanted.codec}", f"--compression-level={wanted.level}"]


def _transport(ref: LayoutRef | RegistryRef, options: RegistryOptions) -> list[str]:
    if not isinstance(ref, RegistryRef):
        return []
    if options.ca_file:
        raise UsageError(
            "buildah takes no --ca-file", hint=f"put the CA in /etc/containers/certs.d/{ref.host}/ca.crt"
        )
    trusted = options.tls_verify and not options.plain_http and not transport.is_loopback(ref.host)
    words = [] if trusted else ["--tls-verify=false"]
    return words + ([f"--authfile={options.auth_file}"] if options.auth_file else [])
