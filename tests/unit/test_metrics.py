# SPDX-License-Identifier: Apache-2.0
"""Numbers for Prometheus, and the lines of `cryoci top`."""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cryoci.errors import ConflictError, UsageError
from cryoci.shim.engines import overview
from cryoci.uses import agent, guard, guard_state, metrics, top


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State directories of this test's own."""
    import posix

    for name in ("CRYOCI_LIB", "CRYOCI_RUN"):
        monkeypatch.setitem(posix.environ, name.encode(), str(tmp_path / name).encode())


def watched(name: str, **changes: object) -> guard_state.State:
    """The state of a guard that is this process."""
    state = guard_state.State(name, "podman", None, "disk", 60.0, 2, pid=os.getpid())
    state.started = guard_state.start_time(os.getpid())
    state.taken = 3
    state.kept = [guard_state.Kept(3, "/nowhere", time.time() - 10, 0.25, 1000)]
    for key, value in changes.items():
        setattr(state, key, value)
    return state


def test_the_format() -> None:
    made = metrics.text(
        [
            metrics.Metric("a_total", "counter", "A.", [({"x": 'q"\\\n'}, 3), ({"x": "y"}, 0.5)]),
            metrics.Metric("b", "gauge", "B.", [({}, 1.5e9), ({}, 1795898901.25)]),
        ]
    )
    assert made == (
        "# HELP a_total A.\n# TYPE a_total counter\n"
        'a_total{x="q\\"\\\\\\n"} 3\na_total{x="y"} 0.5\n# HELP b B.\n# TYPE b gauge\nb 1500000000\nb 1795898901.25\n'
    )


def test_a_guard_and_an_agent_are_served(tmp_path: Path) -> None:
    made = guard.Guard("web", guard.Options(), print)
    made.state = watched("web")
    with metrics.serving("127.0.0.1:0", made.metrics) as port:
        url = f"http://127.0.0.1:{port}"
        said = urllib.request.urlopen(f"{url}/metrics", timeout=5).read().decode()
        assert 'cryoci_guard_checkpoints_total{container="web"} 3\n' in said
        assert 'cryoci_guard_pause_seconds{container="web"} 0.25\n' in said
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url, timeout=5)
        with pytest.raises(ConflictError, match="cannot listen"):
            with metrics.serving(f"127.0.0.1:{port}", made.metrics):
                pass
    idle = agent.Agent(agent.Options(tmp_path, "127.0.0.1:5000/a"), print)
    assert "cryoci_agent_archives 0\n" in metrics.text(idle.metrics())
    with pytest.raises(UsageError), metrics.serving("9464", made.metrics):
        pass
    with metrics.serving(None, made.metrics) as port:
        assert port == 0


def test_top_joins_containers_and_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    watched("web").save()
    watched("lost", phase="lost", pid=0).save()
    watched("over", phase="finished", pid=0).save()
    rows = [overview.Row(name, "1", "podman", "running", 1, 0, 5, ()) for name in ("web", "alone")]
    monkeypatch.setattr(overview, "rows", lambda: rows)
    lines = {line.name: line for line in top.lines()}
    assert set(lines) == {"web", "alone", "lost"}
    web = lines["web"]
    assert web.guard == "watching" and 9 < (web.since or 0) < 15 and 40 < (web.until or 0) < 51
    assert lines["alone"].guard == "" and lines["lost"].state == "gone"
