# SPDX-License-Identifier: Apache-2.0
"""Names of the archives that a kubelet writes: checkpoint-POD_NAMESPACE-CONTAINER-TIME.tar (RFC 3339)."""

from __future__ import annotations

import hashlib
import re
from datetime import datetime

from cryoci.errors import UsageError

_NAME = re.compile(
    r"checkpoint-(?P<of>[a-z0-9][a-z0-9.-]*_[a-z0-9.-]+)-(?P<time>\d{4}-\d\d-\d\dT[0-9:.+Z-]+)\.tar"
)
_OTHER = re.compile(r"[^A-Za-z0-9_.-]")
_LONGEST = 128  # of a tag (distribution-spec 1.1)


def parse(path: str) -> tuple[str, str]:
    """(POD_NAMESPACE-CONTAINER, time) of an archive. Raises UsageError for another file.

    Namespace and container cannot be told apart: both may hold hyphens.
    """
    matched = _NAME.fullmatch(path.rpartition("/")[2])
    if matched is None:
        raise UsageError(
            f"{path[:200]!r} is no archive of a kubelet", hint="checkpoint-POD_NAMESPACE-CONTAINER-TIME.tar"
        )
    return matched["of"], matched["time"]


def created(path: str) -> datetime:
    """The time in the name. Raises UsageError."""
    when = parse(path)[1]
    try:
        return datetime.fromisoformat(when)
    except ValueError as e:
        raise UsageError(f"{path[:200]!r} is no archive of a kubelet: {when} is no time") from e


def tag(path: str) -> str:
    """The tag of its image: the same words, less what a tag cannot hold; unique however long they are."""
    of, when = parse(path)
    text = _OTHER.sub("-", f"{of}-{when}")
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 17]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_of(name: str, pod: str | None, namespace: str | None, container: str | None) -> bool:
    """Is tag `name` of such an image (None: whichever)? As far as a tag tells: see `parse`."""
    words = [re.escape(word) if word is not None else r"[a-z0-9.-]+" for word in (pod, namespace, container)]
    end = r"-\d{4}-" if container is not None else "-"  # a long tag may end before its time
    return re.match("{}_{}-{}".format(*words) + end, name) is not None
