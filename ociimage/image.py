# SPDX-License-Identifier: Apache-2.0
"""Checkpoint images: push, pull, copy, inspect, list, remove. The one module that callers need.

An image is an OCI index that holds one image manifest with a real image config: engines unpack it as any
other. Layer 0 holds everything small, so that it can be inspected without its memory; every bulk file is a
layer of its own. All annotation families are on the manifest and on the index.
"""

from __future__ import annotations

from cryoci.ociimage.catalog import ImageInfo, ImageSummary, LayerInfo, inspect, list_images
from cryoci.ociimage.pack import PackResult, push
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.removal import remove
from cryoci.ociimage.stores import open_store
from cryoci.ociimage.transfer import CopyResult, copy
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.unpack import PulledImage, pull

__all__ = [
    "CopyResult",
    "ImageInfo",
    "ImageSummary",
    "LayerInfo",
    "PackResult",
    "Progress",
    "PulledImage",
    "RegistryOptions",
    "Silent",
    "copy",
    "inspect",
    "list_images",
    "open_store",
    "pull",
    "push",
    "remove",
]
