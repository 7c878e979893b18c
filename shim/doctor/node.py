# SPDX-License-Identifier: Apache-2.0
"""All checks of a node, and the report of any."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cryoci.shim.doctor import engines, gpus, kernel, tools
from cryoci.shim.doctor.check import SCHEMA, Check, Facts

CHECKS = (*kernel.CHECKS, *tools.CHECKS, *gpus.CHECKS, *engines.CHECKS)


def examine(facts: Facts) -> list[Check]:
    """Every check of the node, in order. One that breaks is a failed check, and hides no other."""
    found = []
    for check in CHECKS:
        try:
            result = check(facts)
        except Exception as e:  # a node that nobody foresaw must still get the rest of its report
            fix = "report this, with the output of cryoci doctor --json"
            result = Check(check.__name__, "the check itself", "fail", f"{type(e).__name__}: {e}", fix)
        if result not in found:  # a broken configuration is found by each of its checks
            found.append(result)
    return found


def report(subject: str, checks: Iterable[Check]) -> dict[str, Any]:
    """The JSON form (docs/doctor.md)."""
    found = list(checks)
    return {
        "schema": SCHEMA,
        "subject": subject,
        "ok": all(c.verdict != "fail" for c in found),
        "checks": [vars(c) for c in found],
    }
