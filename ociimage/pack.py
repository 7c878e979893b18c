# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint directory to an image, in one pass: no scratch copy, bounded memory, tagged last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci.errors import UsageError
from cryoci.files import passing
from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, blob, chunks, frames, layers, parallel, stores
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import (
    CONFIG,
    INDEX,
    LAYER_ZSTD,
    MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    digest_of,
    goarch,
    rfc3339,
)
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Recipients
    from cryoci.ociimage.seal.layers import Seal


@dataclass(frozen=True)
class PackResult:
    """An image that was written and read back.

    `digest` is that of the index, to which the tag leads; `size` the bytes of all blobs, `raw_size` those of
    the checkpoint, `skipped` the bytes that were there before, `shared` those of them that are layers of the parent,
    which were not even read.
    """

    digest: str
    manifest_digest: str
    size: int
    raw_size: int
    seconds: float
    reference: str
    skipped: int
    shared: int = 0


def push(
    directory: Path,
    ref: LayoutRef | RegistryRef,
    *,
    annotations: Mapping[str, str] | None = None,
    compression: str = "zstd:1",
    created: datetime | None = None,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    encrypt_to: Recipients | None = None,
    backend: str = "cryoci",
    parent: chunks.Parent | None = None,
    here: Sequence[chunks.Shared] = (),
) -> PackResult:
    """Package the checkpoint in `directory` and write it to `ref`, together with layers that are `here` already.

    `annotations` are facts (annotations.FACTS) or full keys and win over what the checkpoint says itself.
    `created` defaults to the time of the dump, so the same directory gives the same digests; those of layers
    encrypted to `encrypt_to` differ each time. Memory that did not change since `parent` is in layers of that.
    `backend` is "cryoci" or "buildah". Raises ImageError, UsageError, RegistryError, SpaceError; then nothing is
    tagged.
    """
    if backend == "buildah":
        if encrypt_to:
            raise UsageError("buildah does not encrypt as cryoci does", hint="leave out --backend buildah")
        from cryoci.ociimage import buildah

        return buildah.push(
            directory,
            ref,
            annotations=annotations,
            compression=compression,
            created=created,
            registry_options=registry_options,
        )
    began = time.monotonic()
    codec = layers.Compression.parse(compression)
    name = stores.target_name(ref)
    checkpoint = archive.validate(directory)
    raw_size = checkpoint.size + sum(layer.size for layer in here)
    noted = annotations_of(checkpoint, {"raw-size": str(raw_size), **(annotations or {})}, created)
    store = stores.open_store(ref, registry_options, create=True)
    digests = {} if encrypt_to else chunks.of(checkpoint)  # which would tell what the encryption hides
    again = not (encrypt_to or codec.auto)
    push_of = f"{compression} {parent.digest if parent else ''}"
    with store.session(), _remembering(store, directory, push_of, again=again):
        room = layers.most_kept(checkpoint) - len(here)
        shared = [*here, *(parent.select(digests, store, room) if parent else ())]
        plans = layers.plan(checkpoint, {n for layer in shared for n in layer.files}, len(shared))
        seal = _seal(encrypt_to, codec, plans)
        with frames.Pool(codec, layers=len(plans) - 1) as pool:  # the metadata's is small
            done = _put_layers(store, plans, pool, directory, progress or Silent(), seal)
        config = ImageConfig(
            goarch(noted.get(families.CRIU + "host.arch")),
            noted[families.CREATED],
            [writer.diff_id or stored.digest for stored, writer in done] + [old.diff_id for old in shared],
            [f"cryoci push: {plan.title}" for plan in plans]
            + [f"cryoci push: {old.descriptor.annotations.get(families.LAYER_KIND, '')}" for old in shared],
        ).to_bytes()
        held = chunks.notes((tuple(f.name for f in plan.files) for plan in plans), digests)
        descriptors = [
            Descriptor(
                seal.media_type if seal else codec.media_type,
                stored.digest,
                stored.size,
                writer.plan.annotations | marks | (seal.annotations if seal else {}),
            )
            for (stored, writer), marks in zip(done, held, strict=True)
        ]
        descriptors += [old.descriptor for old in shared]
        image, index = _documents(config, descriptors, noted)
        parts = [stored for stored, _ in done]
        parts.append(store.put_blob(blob.Bytes(config), _descriptor(CONFIG, config), lambda n: None))
        manifest_digest = store.put_manifest(image, MANIFEST, None)
        digest = store.put_manifest(index, INDEX, name)
        stores.confirm(store, name, digest)
    taken = sum(old.descriptor.size for old in shared)
    from_parent = sum(old.descriptor.size for old in shared[len(here) :])
    return PackResult(
        digest,
        manifest_digest,
        sum(part.size for part in parts) + taken + len(image) + len(index),
        raw_size,
        time.monotonic() - began,
        str(ref),
        sum(part.size for part in parts if not part.sent) + from_parent,
        from_parent,
    )


def _remembering(
    store: Layout | Registry, directory: Path, compression: str, *, again: bool
) -> AbstractContextManager[None]:
    """What lets a push to a registry be taken up: of layers that come out the same `again`, from files that stay."""
    if not again or not isinstance(store, Registry) or passing(directory):
        return nullcontext()
    return store.remembering(f"{directory.resolve()} {compression}")


def _seal(recipients: Recipients | None, codec: layers.Compression, plans: list[layers.Plan]) -> Seal | None:
    if not recipients:
        return None
    # imported here, because a push in the clear needs no cryptography
    from cryoci.ociimage.seal.layers import Seal

    return Seal(recipients, codec.media_type, [plan.title for plan in plans])


def annotations_of(
    checkpoint: archive.Checkpoint, given: Mapping[str, str], created: datetime | None
) -> dict[str, str]:
    """All annotations of the image of `checkpoint`."""
    when = created or checkpoint.created
    own = {
        "raw-size": str(checkpoint.size),
        "checkpointed": rfc3339(checkpoint.created),
        families.CREATED: rfc3339(when),
    }
    return families.build({"host.arch": goarch(), **checkpoint.facts, **own, **given})


def _documents(
    config: bytes, descriptors: list[Descriptor], noted: Mapping[str, str]
) -> tuple[bytes, bytes]:
    """The bytes of the manifest and of the index."""
    image = Manifest(_descriptor(CONFIG, config), descriptors, noted).to_bytes()
    platform = {"architecture": ImageConfig.parse(config).architecture, "os": "linux"}
    # containers/image adds this mark to what it copies, which would change the digest
    marks = {families.ZSTD: "true"} if any(d.media_type == LAYER_ZSTD for d in descriptors) else {}
    entry = Descriptor(MANIFEST, digest_of(image), len(image), marks, platform)
    return image, Index([entry], noted).to_bytes()


def _descriptor(media_type: str, data: bytes) -> Descriptor:
    return Descriptor(media_type, digest_of(data), len(data))


def _put_layers(
    store: Layout | Registry,
    plans: list[layers.Plan],
    pool: frames.Pool,
    directory: Path,
    progress: Progress,
    seal: Seal | None,
) -> list[tuple[blob.Stored, layers.Writer]]:
    def put(plan: layers.Plan, stop: parallel.Stop) -> tuple[blob.Stored, layers.Writer]:
        token = progress.start(plan.title, plan.raw_size)
        # the digest of what is to stay secret would let anybody see whether a guess at it is right
        writer = layers.Writer(
            directory, plan, pool, lambda n: progress.advance(token, n), with_diff_id=seal is None
        )
        opener = writer.open
        if seal is not None:
            sealer = seal.sealer(plan.title)
            opener = lambda: sealer.seal(writer.open())  # noqa: E731
        # what is neither compressed nor encrypted is as long as its tar
        size = plan.raw_size if pool.compression.codec == "none" and seal is None else None
        source = blob.Opened(lambda: stop.guard(opener()), plan.title, size=size)
        stored = store.put_blob(source, None, lambda n: None)
        progress.done(token)
        return stored, writer

    return parallel.each(put, plans)
