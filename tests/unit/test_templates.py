# SPDX-License-Identifier: Apache-2.0
"""crio-config/: data that engines will read, so it is parsed and agrees with what `cryoci install` writes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.doctor import engines as checks
from cryoci.shim.setup import read
from tests.unit.doctor_node import Given, build

TEMPLATES = Path(__file__).parents[2] / "crio-config"
BIN = "/usr/local/bin/cryoci-runtime"


@pytest.mark.parametrize("path", sorted(TEMPLATES.rglob("*.toml")), ids=lambda p: p.name)
def test_toml(path: Path) -> None:
    tomllib.loads(path.read_text())


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_crio(tmp_path: Path, runtime: str) -> None:
    text = (TEMPLATES / f"crio/99-cryoci-{runtime}.conf").read_text()
    facts = build(tmp_path, Given({"/etc/crio/crio.conf.d/99-cryoci.conf": text}))
    assert checks.crio_criu(facts).verdict == checks.crio_handler(facts).verdict == "ok"
    assert read.crio(facts)["crio"]["runtime"]["runtimes"]["cryoci"]["runtime_root"] == f"/run/{runtime}"


@pytest.mark.parametrize("name", ["config-v2.toml", "conf.d-v3.toml"])
def test_containerd(tmp_path: Path, name: str) -> None:
    facts = build(tmp_path, Given({read.CONTAINERD: (TEMPLATES / "containerd" / name).read_text()}))
    assert checks.containerd_criu(facts).verdict == checks.containerd_handler(facts).verdict == "ok"


def test_podman(tmp_path: Path) -> None:
    text = (TEMPLATES / "podman/99-cryoci.conf").read_text()
    facts = build(tmp_path, Given({"/etc/containers/containers.conf.d/99-cryoci.conf": text, BIN: ""}))
    assert checks.podman_runtime(facts).verdict == "ok"


@pytest.mark.parametrize("name", ["default", "runc", "crun"])
def test_criu_options_exist(name: str) -> None:
    """Every option is one that cryoci itself knows from CRIU's manual."""
    known = {field.replace("_", "-") for field in CriuOptions.__dataclass_fields__}
    lines = (TEMPLATES / f"criu/{name}.conf").read_text().splitlines()
    options = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert set(options) <= known
    assert bool(options) == (name != "default")


def test_kubernetes_manifests_agree() -> None:
    """The RuntimeClass names the handler that is installed, and the label that the DaemonSet's text promises."""
    runtime_class = (TEMPLATES / "kubernetes/base/runtimeclass.yaml").read_text()
    daemon_set = (TEMPLATES / "kubernetes/base/install.yaml").read_text()
    assert re.search(r"^handler: cryoci$", runtime_class, re.MULTILINE)
    assert 'cryoci.io/runtime: "true"' in runtime_class and "cryoci.io/runtime=true" in daemon_set
    assert "\t" not in runtime_class + daemon_set


def test_every_template_is_in_the_table() -> None:
    table = (TEMPLATES / "README.md").read_text()
    for directory in ("crio", "containerd", "podman", "criu", "kubernetes"):
        assert f"{directory}/" in table
