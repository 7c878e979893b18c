# SPDX-License-Identifier: Apache-2.0
"""The catalogue: every row has a log that shows it, and every log leads to its row.

Logs in fixtures/symptoms are the text of the issue or source file that their first line names, as far as it is
quoted there (where people only describe it, the words of their description); those in fixtures/criu-logs are
excerpts of real runs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cryoci.shim.criu import log
from cryoci.shim.criu.log import Verb

FIXTURES = Path(__file__).parents[1] / "fixtures"
SYMPTOMS = sorted((FIXTURES / "symptoms").glob("*.log"))
DOC = Path(__file__).parents[2] / "docs" / "doctor.md"


def verb(path: Path) -> Verb:
    return "restore" if path.name.endswith(".restore.log") else "dump"


@pytest.mark.parametrize("path", SYMPTOMS, ids=lambda p: p.name)
def test_a_symptom_leads_to_its_row(path: Path) -> None:
    cause = log.explain(str(path), verb(path), anywhere=True)
    assert cause is not None
    assert cause.id == path.name.partition(".")[0]
    assert "?" not in cause.summary and "{" not in cause.summary + cause.hint
    assert path.read_text().startswith("# ")


def test_every_row_has_a_log_and_a_place_in_the_table() -> None:
    shown = {path.name.partition(".")[0] for path in SYMPTOMS}
    for path in (FIXTURES / "criu-logs").iterdir():
        cause = log.explain(str(path), verb(path))
        shown.add(cause.id if cause else "")
    assert [known.id for known in log.CAUSES if known.id not in shown] == []
    assert len({known.id for known in log.CAUSES}) == len(log.CAUSES) >= 50
    table = DOC.read_text()
    assert [k.id for k in log.CAUSES if f"| `{k.id}` | {k.source} |" not in table] == []


def formats() -> dict[str, list[re.Pattern[str]]]:
    """What CRIU prints, by source file: its own formats as patterns."""
    found: dict[str, list[re.Pattern[str]]] = {}
    for line in (FIXTURES / "criu-formats.tsv").read_text().splitlines():
        if not line.startswith("#"):
            _, file, text = line.split("\t")
            parts = re.split(r"%#?[0-9]*[a-z]", text)
            found.setdefault(file.rpartition("/")[2], []).append(
                re.compile(".*".join(map(re.escape, parts)))
            )
    return found


def test_the_messages_are_those_of_criu_s_source() -> None:
    """No paraphrase: each line that a log gives as CRIU's has a format of the file that it names."""
    known, checked = formats(), 0
    for path in SYMPTOMS:
        for line in path.read_text().splitlines():
            match = re.search(r"\b(?:Error|Warn)\s+\((\S+\.c):(\d+)\): (.*)", line)
            if match:
                checked += 1
                file = match[1].rpartition("/")[2]
                assert any(p.fullmatch(match[3]) for p in known.get(file, [])), (path.name, line)
    assert checked > 50


def test_sources_are_issues_or_files() -> None:
    for known in log.CAUSES:
        assert re.search(r"^[\w.-]+/[\w.-]+#\d+$|\.c\b|NVIDIA/nvcf ", known.source), known


def test_success_is_no_symptom_anywhere() -> None:
    for path in (FIXTURES / "criu-logs").glob("success*"):
        assert log.explain(str(path), verb(path), anywhere=True) is None


def test_the_verb_of_a_log() -> None:
    assert log.verb_of("", "/x/restore.log") == "restore"
    assert log.verb_of("", "/x/criu-dump.log") == "dump"
    assert log.verb_of("Error (x): Restoring FAILED.\n", "/x/log") == "restore"
    assert log.verb_of("Error (x): Dumping FAILED.\n") == "dump"
