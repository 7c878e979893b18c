# SPDX-License-Identifier: Apache-2.0
"""podman: a drop-in in containers.conf.d (podman 3 and newer), so that no file of the user is touched."""

from __future__ import annotations

from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup import read
from cryoci.shim.setup.plan import RUNTIME, Change, Plan, Read, runtime_path, said_version

DROP_IN = "/etc/containers/containers.conf.d/99-cryoci.conf"
# containers-common's own; a list in a later file replaces one in an earlier, so it must be said again
SUPPORTS_JSON = ["crun", "runc", "kata", "runsc", "youki", "krun"]


def present(facts: Facts) -> bool:
    return bool(
        facts.program("podman") or facts.exists(read.PODMAN[1]) or facts.names(read.PODMAN[1] + ".d")
    )


def plan(facts: Facts, runtime: str, base: Read) -> Plan:
    """The drop-in that names the runtime. Raises ConfigError when containers.conf is broken."""
    config = read.podman(facts)
    before = read.table(config, "engine").get("runtime_supports_json")
    names = [str(n) for n in before if n != RUNTIME] if isinstance(before, list) else SUPPORTS_JSON
    text = (
        "# Written by `cryoci install`; `cryoci uninstall` removes it.\n"
        "[engine]\n"
        "# whose errors podman can read; the whole list, since a later file replaces it\n"
        f"runtime_supports_json = [{', '.join(_quote(n) for n in [*dict.fromkeys(names), RUNTIME])}]\n"
        "\n"
        f'# podman run --runtime={RUNTIME}; for all containers: [engine] runtime = "{RUNTIME}"\n'
        "[engine.runtimes]\n"
        f"{RUNTIME} = [{_quote(runtime_path(facts))}]\n"
    )
    return Plan(
        "podman",
        said_version(facts, "podman"),
        (Change(DROP_IN, base(DROP_IN), text.encode(), whole=True),),
        "nothing: podman reads it at each call (restart podman.service if it serves its API)",
        ("podman", f"--runtime={RUNTIME}", "info", "--format={{.Host.OCIRuntime.Path}}"),
        RUNTIME,
    )


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
