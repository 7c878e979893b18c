# SPDX-License-Identifier: Apache-2.0
"""The host name of a pod outlives what a restore does to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import RestoreError
from cryoci.shim.annotated import podname

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="UTS namespaces are root's")


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Path]:
    """A UTS namespace that is named `pod`."""
    path = tmp_path / "uts"
    path.touch()
    rename(path, "pod", "unshare")
    yield path
    subprocess.run(["umount", path], check=True)


def rename(path: Path, name: str, program: str = "nsenter") -> None:
    script = f"echo {name} >/proc/sys/kernel/hostname"
    subprocess.run([program, f"--uts={path}", "sh", "-c", script], check=True)


def name_of(path: Path) -> str:
    argv = ["nsenter", f"--uts={path}", "cat", "/proc/sys/kernel/hostname"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("hostname", "after"), [(None, "pod"), ("web", "web")])
def test_it_is_put_back(pod: Path, hostname: str | None, after: str) -> None:
    here = os.uname().nodename
    spec = {"hostname": hostname, "linux": {"namespaces": [{"type": "uts", "path": str(pod)}]}}
    put_back = podname.noted(spec)
    rename(pod, "old")
    put_back()
    assert name_of(pod) == after and os.uname().nodename == here


@pytest.mark.parametrize("namespaces", [[], [{"type": "uts"}], [{"type": "ipc", "path": "/none"}], None])
def test_a_container_of_its_own_name_is_let_be(namespaces: object) -> None:
    podname.noted({"hostname": "x", "linux": {"namespaces": namespaces}})()


def test_a_namespace_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match="host name of the pod cannot be kept"):
        podname.noted({"linux": {"namespaces": [{"type": "uts", "path": str(tmp_path / "none")}]}})
