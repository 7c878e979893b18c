# SPDX-License-Identifier: Apache-2.0
"""Memory of a checkpoint, and options of CRIU's, that come to `cryoci-runtime restore` beside its engine.

podman restores out of an archive, which it reads twice and unpacks: memory would be written twice more before CRIU
reads it. So `cryoci restore` leaves the large files of memory out of the archive and offers them here; the runtime
below podman links them into CRIU's image directory, or has CRIU read where they are, with all that podman has
unpacked, where that is on another file system. What podman has no flag for comes the same way.

    /run/cryoci/handover/TOKEN      {"directory": DIR, "names": [NAME, ...], "criu": {KEY: VALUE}}

for as long as the restore runs.

The token stands in an annotation of the container. It is random, and only root can read this directory, so an archive
that somebody else has made names nothing by it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from cryoci import trace
from cryoci.errors import RestoreError
from cryoci.files import read_json, write_json
from cryoci.shim import paths

ANNOTATION = "io.cryoci.handover"
LEAST = 1 << 20  # bytes of a file that is worth it
_NAME = re.compile(r"(?:pages-[0-9]{1,10}|cryoci-memory-[0-9]{1,7}-[0-9a-f]{1,16})\.img\Z")
_TOKEN = re.compile(r"[0-9a-f]{32}\Z")
_LIMIT = 16 << 20  # bytes of a bundle's config.json


@contextmanager
def offered(
    images: str, annotations: MutableMapping[str, Any], criu: Mapping[str, Any] | None = None
) -> Iterator[frozenset[str]]:
    """Offer the large files of memory in `images` for the time of a with block; yields their names.

    No files where somebody other than root could still change them. `criu` are options as in config.toml, and those
    that are None do not count. Notes the token in `annotations`.
    """
    annotations.pop(ANNOTATION, None)
    names = frozenset(name for name in sorted(os.listdir(images)) if _is_large(f"{images}/{name}", name))
    token = secrets.token_hex(16)
    options = {key: value for key, value in (criu or {}).items() if value is not None}
    if not _is_private(images):
        names = frozenset()
    if not names and not options:
        yield names
        return
    place = f"{_base()}/{token}"
    os.makedirs(_base(), mode=0o700, exist_ok=True)
    write_json(place, {"directory": os.path.abspath(images), "names": sorted(names), "criu": options})
    annotations[ANNOTATION] = token
    try:
        yield names
    finally:
        os.unlink(place)


def take(images: str, spec: str) -> tuple[str, dict[str, Any]]:
    """Link what is offered to the container whose specification is the file `spec` into `images`.

    Returns where CRIU's images are, `images` or the directory that they came from, and the options of CRIU's that
    come with them. Raises RestoreError.
    """
    try:
        if not os.listdir(_base()):
            return images, {}
    except OSError:
        return images, {}  # nobody ever offered anything
    token = _token(spec)
    if token is None:
        return images, {}
    try:
        offer = read_json(f"{_base()}/{token}")
    except FileNotFoundError:
        return images, {}  # of an earlier restore: this archive has it all
    except (OSError, ValueError) as e:
        raise RestoreError(f"the memory of the checkpoint cannot be found: {e}", hint="try again") from e
    with trace.span("take over memory"):
        return _link(str(offer["directory"]), offer["names"], images), dict(offer.get("criu") or {})


def _link(directory: str, names: Sequence[str], images: str) -> str:
    """Link the files into `images`; returns where all images are then."""
    for name in names:
        try:
            os.link(f"{directory}/{name}", f"{images}/{name}", follow_symlinks=False)
        except FileExistsError:
            continue
        except OSError as e:
            if e.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                return directory  # what the archive was made of
            raise RestoreError(
                f"{name} of the checkpoint could not be brought to {images}: {e.strerror}",
                hint="see who else uses cryoci's scratch directory: /var/lib/cryoci/tmp, or $TMPDIR",
            ) from e
    return images


def _base() -> str:
    return f"{paths.run_directory()}/handover"


def _token(spec: str) -> str | None:
    try:
        value = json.loads(paths.read(spec, _LIMIT) or b"")
        token = str(value["annotations"][ANNOTATION])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return token if _TOKEN.match(token) else None


def _is_large(path: str, name: str) -> bool:
    if not _NAME.match(name):
        return False
    found = os.lstat(path)
    return stat.S_ISREG(found.st_mode) and found.st_size >= LEAST


def _is_private(directory: str) -> bool:
    found = os.stat(directory)
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
