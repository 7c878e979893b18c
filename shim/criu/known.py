# SPDX-License-Identifier: Apache-2.0
"""A row of the catalogue of failures: text in a log, its cause, and the fix.

`source` is the issue (OWNER/REPO#N) or CRIU's source file (4.2) that prints the text; docs/doctor.md is the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Verb = Literal["dump", "restore"]


@dataclass(frozen=True)
class Known:
    """One symptom. `summary` and `hint` may use the groups of `pattern` as {0}, {1}...

    `anywhere`: other programs print it (drivers' tools, runtimes, engines), so the line need not be CRIU's `Error`.
    """

    id: str
    source: str
    text: str
    summary: str
    hint: str
    verb: Verb | None = None
    anywhere: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.text)  # re keeps what it has compiled
