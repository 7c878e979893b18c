# SPDX-License-Identifier: Apache-2.0
"""The configuration of an engine as the engine sees it: its file, then its drop-ins, merged."""

from __future__ import annotations

import fnmatch
import tomllib
from typing import Any

from cryoci.errors import ConfigError
from cryoci.shim.doctor.check import Facts

CRIO = ("/etc/crio/crio.conf", "/etc/crio/crio.conf.d")
CONTAINERD = "/etc/containerd/config.toml"
RANCHER = ("/var/lib/rancher/k3s/agent/etc/containerd", "/var/lib/rancher/rke2/agent/etc/containerd")
# later ones win (containers.conf(5)); each has a drop-in directory of its name with .d
PODMAN = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
CRI_V2, CRI_V3 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"


def parse(facts: Facts, path: str) -> dict[str, Any]:
    """One TOML file; {} when it is absent. Raises ConfigError with the parser's reason."""
    text = facts.read(path)
    try:
        return tomllib.loads(text) if text is not None else {}
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(
            f"{path} is not valid TOML: {e}", hint="its engine cannot read it either: mend it"
        ) from e


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merge, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def table(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The table at a path of keys; {} when there is none."""
    for key in keys:
        value = config.get(key)
        config = value if isinstance(value, dict) else {}
    return config


def drop_ins(facts: Facts, directory: str, suffix: str = ".conf") -> list[str]:
    """Drop-in files in the order in which engines read them. CRI-O takes every name (OpenShift has 00-default)."""
    return [f"{directory}/{name}" for name in facts.names(directory) if name.endswith(suffix)]


def crio(facts: Facts) -> dict[str, Any]:
    """CRI-O's configuration. Raises ConfigError."""
    config = parse(facts, CRIO[0])
    for path in drop_ins(facts, CRIO[1], ""):
        config = merge(config, parse(facts, path))
    return config


def podman(facts: Facts) -> dict[str, Any]:
    """containers.conf of root. Raises ConfigError."""
    config: dict[str, Any] = {}
    for path in PODMAN:
        for one in (path, *drop_ins(facts, path + ".d")):
            config = merge(config, parse(facts, one))
    return config


def containerd(facts: Facts, path: str = CONTAINERD) -> dict[str, Any]:
    """containerd's configuration, with its imports one level deep. Raises ConfigError.

    containerd 1 replaces a plugin's whole table by an import's, containerd 2 merges (server/config, mergeConfig).
    """
    config = parse(facts, path)
    for imported in imports(facts, config):
        above = parse(facts, imported)
        merged = merge(config, above)
        if config.get("version", 1) < 3:
            merged["plugins"] = {**table(config, "plugins"), **table(above, "plugins")}
        config = merged
    return config


def imports(facts: Facts, config: dict[str, Any]) -> list[str]:
    """The files that `imports` names, globs resolved."""
    found = []
    for pattern in config.get("imports", []):
        directory, _, name = str(pattern).rpartition("/")
        directory = directory if directory.startswith("/") else f"/etc/containerd/{directory}".rstrip("/")
        found += [f"{directory}/{n}" for n in facts.names(directory) if fnmatch.fnmatchcase(n, name)]
    return found


def cri(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and table of containerd's CRI plugin: it moved with version 3 of the file (containerd 2)."""
    name = CRI_V3 if config.get("version", 1) >= 3 else CRI_V2
    return name, table(config, "plugins", name)
