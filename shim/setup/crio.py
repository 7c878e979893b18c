# SPDX-License-Identifier: Apache-2.0
"""CRI-O: a drop-in, which it has read since 1.18 after its main file, so that no file of the user is touched."""

from __future__ import annotations

from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup import read
from cryoci.shim.setup.plan import HANDLER, Change, Plan, Read, runtime_path, said_version

DROP_IN = "/etc/crio/crio.conf.d/99-cryoci.conf"


def present(facts: Facts) -> bool:
    return bool(facts.program("crio") or facts.exists(read.CRIO[0]) or facts.names(read.CRIO[1]))


def plan(facts: Facts, runtime: str, base: Read) -> Plan:
    """The drop-in for a handler over `runtime`. Raises ConfigError when CRI-O's configuration is broken."""
    config = read.crio(facts)
    table = read.table(config, "crio", "runtime")
    runtimes = read.table(table, "runtimes")
    # conmon and its cgroup are as the default handler has them; CRI-O's own defaults where it says nothing
    default = read.table(runtimes, str(table.get("default_runtime", "crun")))
    keep = {k: default[k] for k in ("monitor_path", "monitor_cgroup", "monitor_env") if default.get(k)}
    lines = [
        "# Written by `cryoci install`; `cryoci uninstall` removes it.",
        "[crio.runtime]",
        "# checkpoint and restore through the CRI; CRI-O after 1.36 calls it crio.checkpoint_restore, and knows this",
        "enable_criu_support = true",
        "",
        "# what a RuntimeClass with this handler, or a pod's runtimeClassName, gets",
        f"[crio.runtime.runtimes.{HANDLER}]",
        f"runtime_path = {_toml(runtime_path(facts))}",
        'runtime_type = "oci"',
        f'runtime_root = "/run/{runtime}"',
        *(f"{key} = {_toml(value)}" for key, value in keep.items()),
    ]
    if runtimes.get(HANDLER) and not base(DROP_IN) and not facts.exists(DROP_IN):
        lines.insert(6, f"# this replaces the handler {HANDLER} of another file")
    notes: tuple[str, ...] = ()
    below = str(read.table(runtimes, runtime).get("runtime_path") or "")
    if below and facts.program(runtime) is None:  # CRI-O's own packages keep theirs in /usr/libexec/crio
        notes = (f'{runtime} is not on PATH: set [runtime] path = "{below}" in /etc/cryoci/config.toml',)
    change = Change(DROP_IN, base(DROP_IN), ("\n".join(lines) + "\n").encode(), whole=True)
    return Plan(
        "crio",
        said_version(facts, "crio"),
        (change,),
        "systemctl restart crio (it reads handlers at its start only; running containers are not touched)",
        ("crio", "config"),
        f"[crio.runtime.runtimes.{HANDLER}]",
        notes,
    )


def _toml(value: object) -> str:
    """A string or a list of strings in TOML."""
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
