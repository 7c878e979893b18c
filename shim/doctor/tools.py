# SPDX-License-Identifier: Apache-2.0
"""CRIU, the runtimes, and what they start."""

from __future__ import annotations

import re

from cryoci.errors import CryociError
from cryoci.shim import config
from cryoci.shim.criu.probe import CONFIG_API, FROZEN, CriuVersion, parse
from cryoci.shim.doctor.check import Check, Facts, Verdict
from cryoci.shim.runtime import numbers

CONFIG = "/etc/cryoci/config.toml"
LIBRARIES = ("/usr/lib/criu", "/usr/lib64/criu", "/usr/local/lib/criu", "/usr/libexec/criu")
_NEW_SOCKETS = (6, 16)  # SO_PASSCRED is refused on TCP sockets; CRIU knows since 4.2
_INSTALL = "apt-get install criu (Debian trixie has 4.1.1, sid 4.2), or build it: github.com/checkpoint-restore/criu"


def criu_version(facts: Facts) -> int | None:
    """CRIU's version as CRIU counts (40101 is 4.1.1), or None."""
    said = facts.run("criu", "--version")
    try:
        return parse(said.text) if said else None
    except CryociError:
        return None


def criu(facts: Facts) -> Check:
    name, tested = "criu.version", "criu is on PATH, 4.1 or newer"
    path = facts.program("criu")
    if path is None:
        return Check(name, tested, "fail", "there is no criu on PATH", _INSTALL)
    version = criu_version(facts)
    if version is None:
        said = facts.run("criu", "--version")
        text = said.text.strip().splitlines()[0][:200] if said and said.text.strip() else "nothing"
        return Check(
            name, tested, "fail", f"{path} does not say its version but {text}", f"reinstall it: {_INSTALL}"
        )
    if version < FROZEN:
        why = f"{path} is {CriuVersion('', version)}, which cannot dump a frozen container"
        return Check(name, tested, "fail", why, _INSTALL)
    return Check(name, tested, "ok", f"{path} {CriuVersion('', version)}")


def criu_kernel(facts: Facts) -> Check:
    name, tested = "criu.kernel", "this CRIU knows this kernel"
    version = criu_version(facts)
    if version is None:
        return Check(name, tested, "skip", "no criu")
    running = f"CRIU {CriuVersion('', version)} on Linux {facts.kernel[0]}.{facts.kernel[1]}"
    if facts.kernel >= _NEW_SOCKETS and version < CONFIG_API:
        why = f"{running}: TCP and UDP sockets cannot be dumped"
        return Check(name, tested, "fail", why, f"install CRIU 4.2 or newer: {_INSTALL}")
    return Check(name, tested, "ok", running)


def criu_check(facts: Facts) -> Check:
    name, tested = "criu.check", "`criu check` finds what it needs"
    said = facts.run("criu", "check", timeout=60)
    if said is None:
        return Check(name, tested, "skip", "no criu, or no answer within 60 s")
    if said.status != 0:
        lines = (
            [line for line in said.text.splitlines() if "Error" in line]
            or said.text.splitlines()
            or ["no word"]
        )
        return Check(
            name, tested, "fail", lines[0].strip()[:300], "run `criu check` as root, and see its error"
        )
    return Check(name, tested, "ok", said.text.strip().splitlines()[-1] if said.text.strip() else "ok")


# feature of `criu check --feature` -> what is lost without it
FEATURES = {
    "seccomp_suspend": "containers with a seccomp profile (nearly all) cannot be dumped",
    "clone3_set_tid": "restores are slower and may collide with new processes",
    "move_mount_set_group": "mount-v2 cannot be used: containers with shared mounts may not restore",
    "network_lock_nftables": 'criu.network-lock = "nftables" does not work',
}


def criu_features(facts: Facts) -> Check:
    name, tested = "criu.features", f"`criu check --feature` of {', '.join(FEATURES)}"
    lost = []
    for feature in FEATURES:
        said = facts.run("criu", "check", "--feature", feature, timeout=60)
        if said is None:
            return Check(name, tested, "skip", "no criu, or no answer within 60 s")
        if said.status != 0 and "Unknown feature" not in said.text:
            lost.append(feature)
    if lost:
        worst: Verdict = "fail" if "seccomp_suspend" in lost else "warn"
        fix = (
            "; ".join(FEATURES[f] for f in lost)
            + ": use a newer kernel, run as root, and a CRIU built with all"
        )
        return Check(name, tested, worst, f"missing: {', '.join(lost)}", fix)
    return Check(name, tested, "ok", "all there")


def plugins(facts: Facts) -> Check:
    """A plugin in the wrong directory is not loaded, without a word (criu#2953)."""
    name, tested = "criu.plugins", "plugins are in one directory, where CRIU loads them"
    found = {d: [n for n in facts.names(d) if n.endswith(".so")] for d in LIBRARIES}
    found = {d: names for d, names in found.items() if names}
    if not found:
        return Check(name, tested, "skip", "no plugins; cryoci drives NVIDIA GPUs itself")
    where = "; ".join(f"{d}: {', '.join(names)}" for d, names in found.items())
    if len(found) > 1:
        fix = "keep the directory of this CRIU's build, or name it: criu.libdir in /etc/cryoci/config.toml"
        return Check(name, tested, "warn", f"plugins in several directories: {where}", fix)
    if (
        any("cuda_plugin.so" in names for names in found.values())
        and facts.program("cuda-checkpoint") is None
    ):
        fix = "install cuda-checkpoint on PATH, or remove the plugin: cryoci drives NVIDIA GPUs itself"
        return Check(
            name,
            tested,
            "warn",
            "cuda_plugin.so is there, but not cuda-checkpoint: it turns itself off",
            fix,
        )
    return Check(name, tested, "ok", where)


def network_lock(facts: Facts) -> Check:
    """CRIU locks the container's network while it dumps: by iptables-restore unless told otherwise."""
    name, tested = "criu.network-lock", "the tool that locks the container's network works"
    try:
        chosen = config.load(str(facts.at(CONFIG))).criu.network_lock or "iptables"
    except CryociError:
        chosen = "iptables"  # config.toml has its own check
    if chosen == "skip":
        return Check(name, tested, "ok", 'criu.network-lock = "skip"')
    if chosen == "nftables":
        said = facts.run("criu", "check", "--feature", "network_lock_nftables")
        if said is not None and said.status != 0:
            return Check(
                name,
                tested,
                "fail",
                "this CRIU or kernel cannot lock by nftables",
                "install iptables instead",
            )
        return Check(name, tested, "ok", "nftables, without a tool")
    missing = [n for n in ("iptables-restore", "ip6tables-restore") if facts.program(n) is None]
    fix = 'apt-get install iptables, or criu.network-lock = "nftables" in /etc/cryoci/config.toml'
    if missing:
        return Check(name, tested, "fail", f"{', '.join(missing)}: no such program", fix)
    said = facts.run("iptables-restore", "--test", "/dev/null")
    if said is not None and said.status != 0:
        return Check(name, tested, "fail", f"iptables-restore: {said.text.strip()[:200]}", fix)
    return Check(name, tested, "ok", "iptables")


def runc(facts: Facts) -> Check:
    name, tested = "runtime.runc", "runc knows checkpoint"
    said = facts.run("runc", "--version")
    if said is None:
        return _absent(facts, name, tested, "runc", "crun")
    knows = facts.run("runc", "checkpoint", "--help")
    if knows is None or knows.status != 0:
        return Check(name, tested, "fail", "this runc has no checkpoint verb", "install runc 1.1 or newer")
    return Check(name, tested, "ok", said.text.splitlines()[0] if said.text else "runc")


def crun(facts: Facts) -> Check:
    name, tested = "runtime.crun", "crun was built with CRIU, finds libcriu, and passes configuration files"
    said = facts.run("crun", "--version")
    if said is None:
        return _absent(facts, name, tested, "crun", "runc")
    if "+CRIU" not in said.text:
        fix = "install a crun built with CRIU (Debian, Fedora), or use runc"
        return Check(name, tested, "fail", "this crun was built without CRIU", fix)
    library = libcriu(facts)
    if library is None:
        fix = "apt-get install libcriu2 (Fedora: criu-libs)"
        return Check(name, tested, "fail", "libcriu.so.2 is not there, and crun loads it at checkpoint", fix)
    match = re.search(r"crun version (\S+)", said.text)
    version = numbers(match[1]) if match else ()
    if version < (1, 26) or (criu_version(facts) or 0) < CONFIG_API:
        text = ".".join(map(str, version))
        fix = "use crun 1.26 with libcriu 4.2 or newer where options such as tcp-established matter, or runc"
        return Check(
            name, tested, "warn", f"crun {text} hands CRIU no configuration file: only its own flags", fix
        )
    return Check(name, tested, "ok", f"crun {'.'.join(map(str, version))}, {library}")


def libcriu(facts: Facts) -> str | None:
    """Path of libcriu.so.2, or None."""
    for base in ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64"):
        for directory in (base, *(f"{base}/{n}" for n in facts.names(base) if n.endswith("-linux-gnu"))):
            if facts.exists(f"{directory}/libcriu.so.2"):
                return f"{directory}/libcriu.so.2"
    return None


def _absent(facts: Facts, name: str, tested: str, wanted: str, other: str) -> Check:
    if facts.program(other):
        return Check(name, tested, "skip", f"no {wanted}; {other} is there")
    return Check(name, tested, "fail", "neither runc nor crun is on PATH", f"apt-get install {wanted}")


def cryoci_runtime(facts: Facts) -> Check:
    name, tested = "runtime.cryoci", "cryoci-runtime is on PATH and answers"
    said = facts.run("cryoci-runtime", "--version")
    if said is None:
        fix = "ln -s .../site-packages/cryoci/shim/launcher.py /usr/local/bin/cryoci-runtime"
        return Check(name, tested, "fail", "engines cannot find cryoci-runtime", fix)
    if said.status != 0:
        return Check(name, tested, "fail", said.text.strip()[:300], "run cryoci-runtime --version")
    return Check(name, tested, "ok", f"{facts.program('cryoci-runtime')}")


def configuration(facts: Facts) -> Check:
    name, tested = "cryoci.config", f"{CONFIG} is right"
    try:
        config.load(str(facts.at(CONFIG)))
    except CryociError as e:
        return Check(name, tested, "fail", e.message, e.hint or "")
    return Check(name, tested, "ok", "valid" if facts.exists(CONFIG) else "absent: all defaults")


CHECKS = (
    criu, criu_kernel, criu_check, criu_features, plugins, network_lock, runc, crun, cryoci_runtime, configuration,
)  # fmt: skip
