# SPDX-License-Identifier: Apache-2.0
"""How a container of podman has ended, where podman may start it again by its restart policy."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

import pytest

from cryoci.shim.engines import podman
from cryoci.uses import guard_end

NEW = 99  # pid of the container that podman has started


class Podman:
    """`podman container inspect`: exited, and after `looks` looks running again, if ever."""

    def __init__(self, policy: str, code: int, looks: int | None) -> None:
        self.policy, self.code, self.looks = policy, code, looks
        self.asked = 0

    def inspect(self, argv: list[str], check: bool = True) -> subprocess.CompletedProcess[bytes]:
        self.asked += 1
        again = self.looks is not None and self.asked > self.looks
        state = {
            "Status": "running" if again else "exited",
            "Pid": NEW if again else 0,
            "ExitCode": self.code,
        }
        said = [{"State": state, "HostConfig": {"RestartPolicy": {"Name": self.policy}}}]
        return subprocess.CompletedProcess(argv, 0, json.dumps(said).encode(), b"")


class Container:
    engine, id, root = "podman", "c1", None


@pytest.mark.parametrize(
    ("policy", "code", "by_user", "looks", "how"),
    [
        ("", 137, False, None, "crashed"),
        ("no", 0, False, None, "finished"),
        ("always", 137, False, 3, "restarted"),
        ("always", 0, False, 3, "restarted"),
        ("always", 137, True, None, "stopped"),
        ("unless-stopped", 1, False, 2, "restarted"),
        ("on-failure", 1, False, 2, "restarted"),
        ("on-failure", 0, False, None, "finished"),
        ("on-failure", 137, True, None, "stopped"),
        ("on-failure", 1, False, None, "crashed"),  # its retries are used up
    ],
)
def test_who_brings_it_back(
    monkeypatch: pytest.MonkeyPatch, policy: str, code: int, by_user: bool, looks: int | None, how: str
) -> None:
    engine, container = Podman(policy, code, looks), Container()
    clock = [0.0]
    monkeypatch.setattr(guard_end, "run", engine.inspect)
    monkeypatch.setattr(podman, "stopped_by_user", lambda _: by_user)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    made: Any = container
    assert guard_end._podman(made, 5).how == how
    waits = looks is not None or (policy, code, by_user) == ("on-failure", 1, False)
    assert (clock[0] > 0) is waits and clock[0] < 11
