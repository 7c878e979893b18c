# SPDX-License-Identifier: Apache-2.0
"""A bare container that was restored is checkpointed again, whatever the files of whoever restored it."""

from __future__ import annotations

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, runs_on

pytestmark = pytest.mark.node


NULL = "setsid cryoci restore {ref} -d >/dev/null 2>&1 </dev/null"
LOG = "setsid cryoci restore {ref} -d >>{ref}.log 2>&1 </dev/null"
TERMINAL = "script -qefc 'cryoci restore {ref} -d' {ref}.log </dev/null >/dev/null"


@pytest.mark.parametrize(("kind", "ways"), [("runc", (NULL, LOG)), ("crun", (TERMINAL,))])
def test_restored_under_files_of_the_node(site: Site, kind: str, ways: tuple[str, ...]) -> None:
    """And by its own checkpoint, which could not be stored."""
    node, subject = site.a, site.subject(KINDS[kind])
    before = subject.start()
    for number, way in enumerate(ways):
        ref = f"/srv/{subject.name}.{number}"
        node.run(["cryoci", "checkpoint", subject.name, "-o", ref])
        subject.restored = True
        node.sh(way.format(ref=ref))
        runs_on(before, subject.wait(before["count"] + 1))
    assert f"restored {subject.name} under {kind}" in node.read(f"{ref}.log").decode()
    # CRIU ends it for its connections, the store does not take it, and it is restored in place
    argv = ["cryoci", "checkpoint", subject.name, "--tcp-established", "-o", "127.0.0.1:9/nowhere:1"]
    assert node.run(argv, check=False).returncode != 0
    runs_on(before, subject.wait(before["count"] + 1))
    node.run(["cryoci", "checkpoint", subject.name, "--leave-running", "-o", f"/srv/{subject.name}.last"])
    runs_on(before, subject.wait(before["count"] + 1))
    subject.remove()
