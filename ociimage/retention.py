# SPDX-License-Identifier: Apache-2.0
"""Which images may go: the newest N of each container, those of an age, as much as fits, and never the pinned.

Rules only ever keep less: an image goes when any of them lets it go, and no pin holds it. The newest image
of a container stays unless `last` is 0, whatever its age and size.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from cryoci.errors import UsageError
from cryoci.ociimage import archive, catalog, removal, stores
from cryoci.ociimage.catalog import ImageSummary
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions

_KEPT = "kept"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Policy:
    """`last`: how many of each container stay; `age`: the oldest that stays; `size`: bytes of all that stay.

    None means no such rule. `pins` are patterns of names that stay (fnmatch).
    """

    last: int | None = None
    age: timedelta | None = None
    size: int | None = None
    pins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What becomes of one image, and by which rule."""

    name: str
    digest: str
    container: str
    created: str
    size: int
    goes: bool
    why: str
    removed: bool = False


@dataclass(frozen=True)
class Collected:
    """What a collection did; `freed` is in bytes, and 0 in registries, which free at their own time."""

    place: str
    verdicts: tuple[Verdict, ...]
    freed: int
    dry: bool


def judge(
    images: Sequence[ImageSummary],
    policy: Policy,
    *,
    pinned: frozenset[str],
    now: datetime,
    parts: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Verdict]:
    """Decide about each image, newest first. What cannot be read, or has no time, stays.

    Tags of one digest are one image: it goes only when each of its names may go. `parts` has the blobs of each image
    by its digest, and their sizes, since those that images share take their space once.
    """
    held = {
        i.digest for i in images if i.name in pinned or any(fnmatch.fnmatch(i.name, p) for p in policy.pins)
    }
    order = sorted(images, key=lambda i: (_when(i) or now, i.name), reverse=True)
    seen: dict[str, list[str]] = {}
    space = _Space(parts or {})
    found: list[tuple[ImageSummary, bool, str]] = []
    for image in order:
        when = _when(image)
        mates = seen.setdefault(image.container_name, [])
        if image.digest not in mates:
            mates.append(image.digest)
        place = mates.index(image.digest)
        goes, why = False, _KEPT
        if image.problem or when is None:
            why = image.problem or "kept: it does not say when it was made"
        elif image.digest in held:
            why = "kept: pinned"
        elif policy.last is not None and place >= policy.last:
            goes, why = (
                True,
                f"not among the last {policy.last} of {image.container_name or 'its container'}",
            )
        elif place == 0:
            why = "kept: the newest of its container"
        elif policy.age is not None and now - when > policy.age:
            goes, why = True, f"older than {policy.age}"
        if not goes and why != _KEPT:
            space.take(image)  # what stays whatever its size takes its space first
        found.append((image, goes, why))
    result = []
    for image, goes, why in found:
        if policy.size is not None and why == _KEPT and space.used + space.more(image) > policy.size:
            goes, why = True, f"over {policy.size} bytes in all"
        if not goes:
            space.take(image)
        result.append(
            Verdict(image.name, image.digest, image.container_name, image.created, image.size, goes, why)
        )
    return result


class _Space:
    """What the images that stay take: each blob once."""

    def __init__(self, parts: Mapping[str, Mapping[str, int]]) -> None:
        self._parts = parts
        self._there: set[str] = set()
        self.used = 0

    def _of(self, image: ImageSummary) -> Mapping[str, int]:
        return self._parts.get(image.digest) or {image.digest: image.size}

    def more(self, image: ImageSummary) -> int:
        """The bytes that it would add."""
        return sum(size for digest, size in self._of(image).items() if digest not in self._there)

    def take(self, image: ImageSummary) -> None:
        self.used += self.more(image)
        self._there.update(self._of(image))


def collect(
    ref: LayoutRef | RegistryRef,
    policy: Policy,
    *,
    dry: bool = False,
    now: datetime | None = None,
    registry_options: RegistryOptions | None = None,
) -> Collected:
    """Remove what `policy` lets go from a layout or repository; with `dry` only say what would go.

    Without any rule a layout frees the blobs that no image needs. Raises NotFoundError, RegistryError, and
    UsageError for a policy that is off.
    """
    if policy.last is not None and policy.last < 0:
        raise UsageError(f"cannot keep the last {policy.last} images", hint="give 0 or more")
    store = stores.open_store(ref, registry_options)
    pinned = frozenset(store.pins()) if isinstance(store, Layout) else frozenset[str]()
    listed = catalog.listed(store)
    images, parts = [image for image, _ in listed], {image.digest: blobs for image, blobs in listed}
    verdicts = judge(images, policy, pinned=pinned, now=now or datetime.now(UTC), parts=parts)
    if dry:
        return Collected(str(ref), tuple(verdicts), 0, dry)
    for digest in dict.fromkeys(v.digest for v in verdicts if v.goes):
        # all names of a digest go, or none
        removal.remove_names(store, digest, [v.name for v in verdicts if v.digest == digest])
    done = tuple(replace(v, removed=v.goes) for v in verdicts)
    return Collected(str(ref), done, store.collect() if isinstance(store, Layout) else 0, dry)


def parse_age(text: str) -> timedelta:
    """ "30d", "12h", "90m". Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if not match:
        raise UsageError(f"bad age {text!r}", hint="write 30d, 12h or 2w")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def parse_bytes(text: str) -> int:
    """ "10G", "500M"; powers of 1000. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})([kmgtKMGT]?)B?", text)
    if not match:
        raise UsageError(f"bad size {text!r}", hint="write 10G or 500M")
    return int(match[1]) * _BYTES[match[2].lower()]


def _when(image: ImageSummary) -> datetime | None:
    return archive.parse_time(image.created)
