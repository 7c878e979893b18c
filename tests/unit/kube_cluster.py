# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""A real kubectl with the plugin on its PATH, the API server that it talks to, and checkpoint images to restore."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cryoci.errors import NotFoundError
from cryoci.ociimage import image, reference
from tests.nodes import kubectl
from tests.unit.images import make_checkpoint, registry  # noqa: F401
from tests.unit.kube_api import Api, Asked, serving

REPO = Path(__file__).resolve().parents[2]
MANIFESTS = REPO / "crio-config/kubernetes"


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return kubectl.program()
    except NotFoundError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def images(registry: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoint images in a registry: of a CPU, and of two H100s; as HOST/REPO:TAG@DIGEST."""
    directory = make_checkpoint(tmp_path_factory.mktemp("image") / "ck", pages=1 << 20)
    chips = json.dumps(["NVIDIA H100 80GB HBM3"] * 2)
    facts = {"cpu": {}, "gpu": {"gpu.names": chips, "gpu.driver": "580.159.04"}}
    found = {}
    for name, noted in facts.items():
        ref = reference.parse(f"{registry}/checkpoints:{name}")
        assert isinstance(ref, reference.RegistryRef)
        noted = {"host.arch": "x86_64", **noted}
        found[name] = f"{ref}@{image.push(directory, ref, annotations=noted).digest}"
    return found


class Cluster:
    """A kubectl with the plugin on its PATH, and the server that it talks to."""

    def __init__(self, program: str, api: Api, config: Path, directory: Path) -> None:
        self.program, self.api, self.config = program, api, config
        plugins = directory / "plugins"
        plugins.mkdir()
        plugin = plugins / "kubectl-cryoci"
        plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -m cryoci.cli.kubectl_cryoci "$@"\n')
        plugin.chmod(0o755)
        (plugins / "kubectl").symlink_to(program)
        self.env = {
            **os.environ,
            "KUBECONFIG": str(config),
            "PATH": f"{plugins}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(directory),
            "PYTHONPATH": str(REPO),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.kubectl("cryoci", *words)

    def kubectl(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [self.program, *words]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60, check=False)

    def fails(self, *words: str) -> str:
        result = self.run(*words)
        assert result.returncode in (1, 2), result.stdout + result.stderr
        assert "Traceback" not in result.stderr and "hint: " in result.stderr, result.stderr
        return result.stderr


@pytest.fixture
def cluster(program: str, tmp_path: Path) -> Iterator[Cluster]:
    with serving(tmp_path) as (api, config):
        yield Cluster(program, api, config, tmp_path)


def role(name: str, *files: str) -> list[dict[str, Any]]:
    """The rules of a ClusterRole in the manifests."""
    texts = [(MANIFESTS / file).read_text() for file in files]
    found = [one for text in texts for one in yaml.safe_load_all(text) if one["kind"] == "ClusterRole"]
    rules: list[dict[str, Any]] = next(one for one in found if one["metadata"]["name"] == name)["rules"]
    return rules


def granted(rules: list[dict[str, Any]]) -> set[Asked]:
    return {
        Asked(verb, group, resource)
        for rule in rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
