# SPDX-License-Identifier: Apache-2.0
"""The engines: whether they may checkpoint, and whether they know cryoci-runtime."""

from __future__ import annotations

from typing import Any

from cryoci.errors import ConfigError
from cryoci.shim.doctor.check import Check, Facts
from cryoci.shim.setup import read

RUNTIME = "cryoci-runtime"
_INSTALL = "cryoci install --engine"


def _is_ours(path: object) -> bool:
    return isinstance(path, str) and path.rpartition("/")[2] == RUNTIME


def crio_criu(facts: Facts) -> Check:
    name, tested = "crio.checkpoint", "CRI-O may checkpoint and restore"
    config = _config(facts, "crio")
    if not isinstance(config, dict):
        return config or Check(name, tested, "skip", "no CRI-O")
    level = read.table(config, "crio", "checkpoint_restore").get(
        "container_level_enabled", "checkpoint_restore"
    )
    if level != "checkpoint_restore":
        fix = f'[crio.checkpoint_restore] container_level_enabled = "checkpoint_restore", or {_INSTALL} crio'
        return Check(name, tested, "fail", f'container_level_enabled is "{level}"', fix)
    if read.table(config, "crio", "runtime").get("enable_criu_support", True) is False:
        fix = f"[crio.runtime] enable_criu_support = true, or {_INSTALL} crio"
        return Check(name, tested, "fail", "enable_criu_support is false", fix)
    return Check(name, tested, "ok", "enabled")


def crio_handler(facts: Facts) -> Check:
    name, tested = "crio.handler", "CRI-O has a runtime handler that is cryoci-runtime"
    config = _config(facts, "crio")
    if not isinstance(config, dict):
        return config or Check(name, tested, "skip", "no CRI-O")
    for handler, table in read.table(config, "crio", "runtime", "runtimes").items():
        if isinstance(table, dict) and _is_ours(table.get("runtime_path")):
            return Check(name, tested, "ok", f"handler {handler}")
    return Check(name, tested, "warn", "none", f"{_INSTALL} crio")


def containerd_criu(facts: Facts) -> Check:
    name, tested = "containerd.checkpoint", "containerd's CRI plugin may checkpoint"
    config = _config(facts, "containerd")
    if not isinstance(config, dict):
        return config or Check(name, tested, "skip", "no containerd")
    _, cri = read.cri(config)
    if cri.get("enable_criu", True) is False:
        return Check(
            name, tested, "fail", "enable_criu is false", "set enable_criu = true in the CRI plugin's table"
        )
    return Check(name, tested, "ok", "enabled")


def containerd_handler(facts: Facts) -> Check:
    name, tested = (
        "containerd.handler",
        "containerd has a runtime handler whose BinaryName is cryoci-runtime",
    )
    config = _config(facts, "containerd")
    if not isinstance(config, dict):
        return config or Check(name, tested, "skip", "no containerd")
    plugin, cri = read.cri(config)
    for handler, table in read.table(cri, "containerd", "runtimes").items():
        if isinstance(table, dict) and _is_ours(read.table(table, "options").get("BinaryName")):
            return Check(name, tested, "ok", f"handler {handler} of {plugin}")
    other = read.CRI_V2 if plugin == read.CRI_V3 else read.CRI_V3
    if any(_is_ours(read.table(t, "options").get("BinaryName"))
           for t in read.table(config, "plugins", other, "containerd", "runtimes").values()
           if isinstance(t, dict)):  # fmt: skip
        why = (
            f"it stands under {other}, which version = {config.get('version', 1)} of the file does not read"
        )
        return Check(name, tested, "fail", why, f"move it under {plugin}, or {_INSTALL} containerd")
    return Check(name, tested, "warn", "none", f"{_INSTALL} containerd")


def podman_runtime(facts: Facts) -> Check:
    name, tested = "podman.runtime", "podman knows the runtime cryoci-runtime"
    config = _config(facts, "podman")
    if not isinstance(config, dict):
        return config or Check(name, tested, "skip", "no podman")
    named = read.table(config, "engine", "runtimes").get(RUNTIME)
    if not named:
        return Check(name, tested, "warn", "no", f"{_INSTALL} podman")
    gone = [p for p in named if not facts.exists(str(p))]
    if len(gone) == len(named):
        return Check(
            name,
            tested,
            "fail",
            f"{gone[0]} does not exist",
            f"{_INSTALL} podman, or mend [engine.runtimes]",
        )
    if RUNTIME not in read.table(config, "engine").get("runtime_supports_json", []):
        fix = f"add it to runtime_supports_json: {_INSTALL} podman"
        return Check(name, tested, "warn", "yes, but its errors are shown without their text", fix)
    return Check(name, tested, "ok", str(named[0]))


def criu_files(facts: Facts) -> Check:
    """An option in default.conf loses against what the runtime asks for; runc.conf wins (criu#599, #2535)."""
    name, tested = "criu.conf", "tcp-established stands in the file that wins, if anywhere"
    lines = {n: (facts.read(f"/etc/criu/{n}.conf") or "").split("\n") for n in ("default", "runc", "crun")}
    here = [
        n
        for n, text in lines.items()
        if any(line.split("#")[0].strip() == "tcp-established" for line in text)
    ]
    if here == ["default"]:
        fix = "move it to /etc/criu/runc.conf (crun 1.26+: crun.conf), or set criu.tcp-established in config.toml"
        return Check(name, tested, "warn", "/etc/criu/default.conf has it, which runtimes override", fix)
    if "crun" in here and "runc" not in here and facts.program("runc"):
        fix = "put it into /etc/criu/runc.conf as well: runc reads no other"
        return Check(name, tested, "warn", "only /etc/criu/crun.conf has it", fix)
    return Check(
        name, tested, "ok", f"in {', '.join(here)}.conf" if here else "nowhere; per container by cryoci"
    )


def _config(facts: Facts, engine: str) -> dict[str, Any] | Check | None:
    """An engine's configuration, a failed check when it is broken, None when there is no such engine."""
    paths = {"crio": read.CRIO[0], "containerd": read.CONTAINERD, "podman": read.PODMAN[1]}
    drop_ins = {"crio": read.CRIO[1], "podman": read.PODMAN[1] + ".d"}.get(engine)
    there = facts.program(engine) or facts.exists(paths[engine]) or (drop_ins and facts.names(drop_ins))
    if not there:
        return None
    try:
        return {"crio": read.crio, "containerd": read.containerd, "podman": read.podman}[engine](facts)
    except ConfigError as e:
        return Check(
            f"{engine}.config", f"{engine}'s configuration can be read", "fail", e.message, e.hint or ""
        )


CHECKS = (crio_criu, crio_handler, containerd_criu, containerd_handler, podman_runtime, criu_files)
