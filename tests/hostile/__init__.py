# SPDX-License-Identifier: Apache-2.0
"""Hostile checkpoints, made by hand, and what must never happen when any verb is given one.

`ARCHIVES`, `DOCUMENTS`, `IMAGES`, `LAYOUTS` and `PLACES` are the corpus; `exercise` gives one to every verb and
returns what went wrong, which must be nothing: files outside of the sandbox, links, devices, odd modes,
tracebacks, control characters on the terminal. bench/fuzz_archives.py goes on from here at random.
"""

from tests.hostile.layouts import D0, LAYOUTS, PLACES, Change, layout_of, saved
from tests.hostile.tars import ARCHIVES, CONFIG, SPEC, members_of, pack, pax, raw, whole
from tests.hostile.texts import DOCUMENTS, IMAGES
from tests.hostile.verbs import (
    ARCHIVE_VERBS,
    CRIU_VERBS,
    DOCUMENT_VERBS,
    IMAGE_VERBS,
    TAR_VERBS,
    VERBS,
    digest,
    environment,
    exercise,
    write,
)

__all__ = [
    "ARCHIVES",
    "ARCHIVE_VERBS",
    "CONFIG",
    "CRIU_VERBS",
    "D0",
    "DOCUMENTS",
    "DOCUMENT_VERBS",
    "IMAGES",
    "IMAGE_VERBS",
    "LAYOUTS",
    "PLACES",
    "SPEC",
    "TAR_VERBS",
    "VERBS",
    "Change",
    "digest",
    "environment",
    "exercise",
    "layout_of",
    "members_of",
    "pack",
    "pax",
    "raw",
    "saved",
    "whole",
    "write",
]
