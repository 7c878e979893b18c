# SPDX-License-Identifier: Apache-2.0
"""containerd, alone or inside of k3s and RKE2.

A drop-in only where the file is of version 3 and imports a directory already. containerd 1 replaces the whole table
of the CRI plugin by that of an import (so a drop-in would take the user's registry mirrors and pause image away), and
adding `imports` to a file of version 3 changes a line of the user's. A block at the end of the main file is right
everywhere: TOML lets tables stand in any order.
"""

from __future__ import annotations

import fnmatch
import tomllib
from typing import Any

from cryoci.errors import ConfigError
from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup import read
from cryoci.shim.setup.plan import HANDLER, Change, Plan, Read, runtime_path, said_version, with_block

DROP_IN = "99-cryoci.toml"
_BASE = '{{ template "base" . }}\n'  # what k3s and RKE2 would write anyway


def present(facts: Facts) -> bool:
    return bool(_rancher(facts) or facts.program("containerd") or facts.exists(read.CONTAINERD))


def _rancher(facts: Facts) -> str | None:
    return next((d for d in read.RANCHER if facts.exists(f"{d}/config.toml")), None)


def plan(facts: Facts, runtime: str, base: Read) -> Plan:
    """Where the handler goes, and what it is. Raises ConfigError: broken TOML, or a file of version 1."""
    directory = _rancher(facts)
    return _in_rancher(facts, directory, base) if directory else _alone(facts, base)


def _alone(facts: Facts, base: Read) -> Plan:
    raw = base(read.CONTAINERD)
    version = said_version(facts, "containerd")
    config = _parse(raw or b"", read.CONTAINERD)
    if raw is None or not raw.strip():
        config = {"version": 3 if version.startswith("2") else 2}
    number = config.get("version", 1)
    if {"cri", "io.containerd.grpc.v1.cri"} & set(config.get("disabled_plugins", [])):
        note = "its CRI plugin is disabled, so there are no handlers; ctr takes --runc-binary=cryoci-runtime"
        return Plan("containerd", version, (), "nothing", notes=(note,))
    if number not in (2, 3):
        raise ConfigError(
            f"{read.CONTAINERD} is of version {number}, which cryoci does not edit",
            hint="containerd config migrate > /etc/containerd/config.toml.new, look at it, and put it in place",
        )
    full = read.containerd(facts)
    winner = _last_with_cri(facts, config) if number == 2 else None
    forgets = number == 2 and _forgets(winner or read.CONTAINERD, base)
    block = _block(facts, full if full else config, number, forgets=forgets)
    where = _imported(config) if number == 3 else None
    if where:
        path = f"{where}/{DROP_IN}"
        text = f"# Written by `cryoci install`; `cryoci uninstall` removes it.\nversion = 3\n\n{block}"
        change = Change(path, base(path), text.encode(), whole=True)
    else:
        path, raw = (winner, base(winner)) if winner else (read.CONTAINERD, raw)
        start = raw.decode() if raw and raw.strip() else f"version = {number}\n"
        after = with_block(start, block)
        _parse(after.encode(), f"{path} with cryoci's block")
        change = Change(path, raw, after.encode(), whole=False)
    return Plan(
        "containerd",
        version,
        (change,),
        "systemctl restart containerd (running containers are not touched)",
        ("containerd", "--config", read.CONTAINERD, "config", "dump"),
        f"runtimes.{HANDLER}",
    )


def _in_rancher(facts: Facts, directory: str, base: Read) -> Plan:
    config = read.parse(facts, f"{directory}/config.toml")  # generated from the template at each start
    number = int(config.get("version", 2))
    path = f"{directory}/config-v3.toml.tmpl" if number == 3 else f"{directory}/config.toml.tmpl"
    raw = base(path)
    text = raw.decode(errors="surrogateescape") if raw is not None else _BASE
    after = with_block(text, _block(facts, config, number))
    name = "k3s" if "/k3s/" in directory else "rke2"
    return Plan(
        name,
        said_version(facts, name),
        (Change(path, raw, after.encode(errors="surrogateescape"), whole=False),),
        f"systemctl restart {name} (or {name}-agent): it writes config.toml from the template",
        notes=(f"{directory}/config.toml is generated: the template beside it is edited",),
    )


def _parse(raw: bytes, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(
            f"{what} is not valid TOML: {e}",
            hint="write the handler by hand: see crio-config/containerd/",
        ) from e


def _imported(config: dict[str, Any]) -> str | None:
    """The directory of which `imports` takes every *.toml, if there is one."""
    for pattern in config.get("imports", []):
        directory, _, name = str(pattern).rpartition("/")
        if (
            directory.startswith("/")
            and "*" not in directory
            and "*" in name
            and fnmatch.fnmatchcase(DROP_IN, name)
        ):
            return directory
    return None


def _last_with_cri(facts: Facts, config: dict[str, Any]) -> str | None:
    """The import whose CRI table containerd 1 takes instead of the main file's, if there is one."""
    found = [
        p for p in read.imports(facts, config) if read.table(read.parse(facts, p), "plugins", read.CRI_V2)
    ]
    return found[-1] if found else None


def _forgets(path: str, base: Read) -> bool:
    """Whether the file has no handler runc, by the user.

    containerd 1 drops the one that it has by itself when a file names another, and its CRI plugin does not load then
    ("no corresponding runtime configured", 1.7.24); containerd 2 keeps it.
    """
    config = _parse(base(path) or b"", path)
    return not read.table(config, "plugins", read.CRI_V2, "containerd", "runtimes", "runc")


def _block(facts: Facts, config: dict[str, Any], number: int, *, forgets: bool = False) -> str:
    """The handler's tables, in the words of the file's version. Cgroups are as for the default handler."""
    plugin = read.CRI_V3 if number == 3 else read.CRI_V2
    cri = read.table(config, "plugins", plugin, "containerd")
    name = str(cri.get("default_runtime_name", "runc"))
    default = read.table(cri, "runtimes", name, "options")
    runtimes = f"[plugins.'{plugin}'.containerd.runtimes"
    table = f"{runtimes}.{HANDLER}"
    lines = [
        *(
            [f"{runtimes}.runc]", '  runtime_type = "io.containerd.runc.v2"']
            if forgets and name == "runc"
            else []
        ),
        f"{table}]",
        '  runtime_type = "io.containerd.runc.v2"',
        "  # annotations of pods that reach cryoci-runtime",
        '  pod_annotations = ["io.cryoci.*", "restore.criu.org/*"]',
        '  container_annotations = ["io.cryoci.*", "restore.criu.org/*"]',
        f"{table}.options]",
        f'  BinaryName = "{runtime_path(facts)}"',
    ]
    if default.get("SystemdCgroup") is True:
        lines.append("  SystemdCgroup = true")
    return "\n".join(lines) + "\n"
