# SPDX-License-Identifier: Apache-2.0
"""`cryoci warm`: have all that a restore needs on this node before it is asked for.

Checkpoint images go to the local store, each blob verified, and by that into the page cache; there they can be
unpacked as well (warm_unpacked.py); or they go into memory for good (warm_memory.py). Their base images go to
podman's storage.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cryoci.command import run
from cryoci.errors import NotFoundError, UsageError
from cryoci.ociimage import image, reference, stores
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.unpack import Gate
from cryoci.shim.engines import podman
from cryoci.uses import warm_memory, warm_unpacked


@dataclass(frozen=True)
class Warmed:
    """An image, to be restored as `name`: `size` bytes, of which `fetched` were not there. `base`: its base image.

    `place` is "cache", "tmpfs" or "unpacked"; then its files take `unpacked` bytes.
    """

    name: str
    digest: str
    size: int
    fetched: int
    base: str
    base_pulled: bool
    seconds: float
    place: str = "cache"
    unpacked: int = 0


def warm(
    ref: reference.Reference,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    gate: Gate | None = None,
) -> Warmed:
    """Warm one image; `gate` is as in `unpack.pull`. Raises NotFoundError, IntegrityError, TrustError, RegistryError,
    UsageError.
    """
    began = time.monotonic()
    if isinstance(ref, reference.RegistryRef):
        local = _local(ref)
        copied = image.copy(ref, local, progress=progress, registry_options=registry_options, gate=gate)
        fetched = copied.size - copied.skipped
    elif isinstance(ref, reference.LayoutRef):
        local, fetched = ref, 0
    else:
        raise UsageError(f"{ref} is no image", hint="give HOST/REPO:TAG, or NAME of the local store")
    store = stores.open_store(local, None)
    found = stores.resolve(store, stores.source_name(local, store))
    size = 0
    for blob in (found.manifest.config, *found.manifest.layers):
        size += sum(len(chunk) for chunk in store.open_blob(blob))
    base, pulled = _base(image.inspect(local))
    return Warmed(
        str(local.name or local), found.top.digest, size, fetched, base, pulled, time.monotonic() - began
    )


def _local(ref: reference.RegistryRef) -> reference.LayoutRef:
    """What it is called in the local store: the repository alone may be somebody's own image there."""
    name = f"{ref.repository}:{ref.tag or (ref.digest or '').replace('sha256:', '')[:12] or 'latest'}"
    return reference.LayoutRef(reference.default_store(), name)


def unpack(
    ref: reference.Reference,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    gate: Gate | None = None,
) -> Warmed:
    """Warm one image, and unpack it; `gate` is as in `warm`. Raises what `warm` and `warm_unpacked.put` raise."""
    began = time.monotonic()
    if isinstance(ref, reference.LayoutRef) and (ref.path != reference.default_store() or not ref.name):
        raise UsageError(f"{ref} has no name in the local store", hint="give HOST/REPO:TAG, or NAME[:TAG]")
    made = warm(ref, progress=progress, registry_options=registry_options, gate=gate)
    local = reference.LayoutRef(reference.default_store(), made.name)
    size = warm_unpacked.put(local, progress=progress).size
    return replace(made, place="unpacked", unpacked=size, seconds=time.monotonic() - began)


def hold(
    ref: reference.Reference,
    limit: int | None,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
) -> Warmed:
    """Warm one image in memory; `limit` is as in warm_memory.put. Raises what that raises."""
    began = time.monotonic()
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{ref} is no image", hint="give HOST/REPO:TAG, or NAME of the local store")
    made = warm_memory.put(ref, limit, progress=progress, registry_options=registry_options)
    base, pulled = _base(image.inspect(ref, registry_options=registry_options))
    name = ref.name if isinstance(ref, reference.LayoutRef) and ref.name else str(ref)
    fetched, seconds = made.size - made.skipped, time.monotonic() - began
    return Warmed(name, made.digest, made.size, fetched, base, pulled, seconds, "tmpfs")


def drop(refs: list[reference.LayoutRef | reference.RegistryRef]) -> list[str]:
    """Take images out of memory, and remove what lies unpacked of them; all of both without `refs`.

    Returns their names. Raises NotFoundError for one that is in neither place, ConflictError while one is restored.
    """
    if not refs:
        return list(dict.fromkeys([*warm_memory.drop(None), *warm_unpacked.drop(None)]))
    gone = []
    for ref in refs:
        found = warm_unpacked.drop(_local(ref) if isinstance(ref, reference.RegistryRef) else ref)
        try:
            found += warm_memory.drop([ref])
        except NotFoundError:
            if not found:
                raise
        gone += found
    return list(dict.fromkeys(gone))


def _base(info: image.ImageInfo) -> tuple[str, bool]:
    """The base image of the checkpoint, in podman's storage; ("", False) when it needs none."""
    wanted = str(info.facts.get("image.reference", ""))
    if (
        info.engine != "podman"
        or "@sha256:" not in wanted
        or wanted.startswith("-")
        or not podman.installed()
    ):
        return "", False
    if run(["podman", "image", "exists", "--", wanted], check=False).returncode == 0:
        return wanted, False
    podman.pull(wanted)
    return wanted, True
