# SPDX-License-Identifier: Apache-2.0
"""The base image of a bare container, from its registry into a root directory: for runc and crun have no images.

Each layer is verified as it comes, and unpacked inside of the root (`shim/rootfs.py`): a base image is named by a
checkpoint, and no more to be trusted than it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cryoci.errors import NotFoundError, RegistryError, UsageError
from cryoci.files import scratch
from cryoci.ociimage import convert, dialects, incoming, reference, rootfsdiff, stores
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import rootfs

_HINT = "prepare a bundle with the same base rootfs and give it (--bundle DIR), or restore it under podman"


def filler(directory: Path, registry_options: RegistryOptions | None) -> Callable[[Path], None]:
    """What fills a root directory with the base image of the checkpoint in `directory`.

    It raises NotFoundError when nobody says where that is, or it is not there, and what `fill` raises.
    """

    def into(root: Path) -> None:
        model = dialects.read(directory)
        name = model.facts.get("image.reference") or convert.own_base(model).pinned
        try:
            ref = reference.parse(name)
        except UsageError:
            ref = None
        if not isinstance(ref, RegistryRef):
            raise NotFoundError(
                "the checkpoint does not hold the container's whole file system, nor say where its base image is",
                hint=_HINT,
            )
        try:
            fill(ref, root, registry_options)
        except (RegistryError, NotFoundError) as e:
            raise NotFoundError(
                f"the base image {name} could not be fetched: {e.message}", hint=_HINT
            ) from e

    return into


def fill(ref: LayoutRef | RegistryRef, root: Path, registry_options: RegistryOptions | None) -> None:
    """Unpack the image `ref` for this machine into `root`, lowest layer first.

    Raises NotFoundError, RegistryError, ImageError, IntegrityError, RestoreError, SpaceError.
    """
    store = stores.open_source(ref, registry_options)
    found = stores.resolve(store, stores.source_name(ref, store))
    stores.read_config(store, found.manifest)
    for layer in found.manifest.layers:
        incoming.check_type(layer)
        with scratch("base.") as place:
            with open(place / "layer", "xb") as file:
                for chunk in store.open_blob(layer):
                    file.write(chunk)
            gone, hides_all = rootfsdiff.from_layer(place / "layer", place / "diff.tar")
            if hides_all:
                gone += os.listdir(root)
            if gone:  # of the layers below, so before what this one brings
                rootfsdiff.write_deleted(place / "deleted.files", gone)
                rootfs.apply(root, None, place / "deleted.files")
            if (place / "diff.tar").exists():
                rootfs.apply(root, place / "diff.tar")
