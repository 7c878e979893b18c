# SPDX-License-Identifier: Apache-2.0
"""Where podman's init is on this node, and what becomes of a checkpoint's mount of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConfigError, NotFoundError
from cryoci.shim.doctor.check import Facts
from cryoci.shim.engines.podman_init import find, settle


@pytest.fixture
def node(tmp_path: Path) -> Path:
    (tmp_path / "usr/libexec/podman").mkdir(parents=True)
    (tmp_path / "etc/containers/containers.conf.d").mkdir(parents=True)
    return tmp_path


def facts(node: Path) -> Facts:
    return Facts(node, path="")


def test_where_podman_looks(node: Path) -> None:
    with pytest.raises(NotFoundError, match="no catatonit") as caught:
        find(facts(node))
    assert "apt-get install catatonit" in str(caught.value.hint)
    (node / "usr/libexec/podman/catatonit").touch()
    assert find(facts(node)) == "/usr/libexec/podman/catatonit"


@pytest.mark.parametrize("table", ["containers", "engine"])
def test_what_containers_conf_names(node: Path, table: str) -> None:
    (node / "usr/libexec/podman/catatonit").touch()
    conf = node / "etc/containers/containers.conf.d/10-init.conf"
    conf.write_text(f'[{table}]\ninit_path = "/opt/tini"\n')
    with pytest.raises(NotFoundError, match="no /opt/tini"):
        find(facts(node))
    (node / "opt").mkdir()
    (node / "opt/tini").touch()
    assert find(facts(node)) == "/opt/tini"
    conf.write_text("[")
    with pytest.raises(ConfigError):
        find(facts(node))


def test_the_mount_is_this_nodes_and_read_only(node: Path) -> None:
    (node / "usr/libexec/podman/catatonit").touch()
    evil: dict[str, Any] = {
        "destination": "/run/podman-init",
        "source": "/etc/shadow",
        "options": ["rbind", "rw"],
    }
    other = {"destination": "/data", "source": "/data"}
    settle({"mounts": [evil, other]}, facts(node))
    assert evil["source"] == "/usr/libexec/podman/catatonit" and evil["options"] == ["rbind", "ro"]
    assert other == {"destination": "/data", "source": "/data"}


def test_without_one_nothing_is_looked_for(node: Path) -> None:
    settle({"mounts": []}, facts(node))
