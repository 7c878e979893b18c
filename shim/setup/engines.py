# SPDX-License-Identifier: Apache-2.0
"""Installing into the engines of a node, as a whole."""

from __future__ import annotations

import re
import tomllib
from typing import Any, Protocol

from cryoci.errors import ConfigError, NotFoundError
from cryoci.shim.doctor import engines as checks
from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup import containerd, crio, podman
from cryoci.shim.setup.plan import Change, Plan, Read
from cryoci.shim.setup.store import Store

CONFIG = "/etc/cryoci/config.toml"


class _Engine(Protocol):
    def present(self, facts: Facts) -> bool: ...
    def plan(self, facts: Facts, runtime: str, base: Read) -> Plan: ...


ENGINES: dict[str, _Engine] = {"crio": crio, "containerd": containerd, "podman": podman}


def plans(facts: Facts, store: Store, engine: str, runtime: str | None) -> list[Plan]:
    """What to do for `engine`, or with "auto" for every engine that is here.

    `runtime` (runc, crun) also becomes [runtime] path of config.toml. Raises NotFoundError, ConfigError.
    """
    chosen = (
        [name for name, module in ENGINES.items() if module.present(facts)] if engine == "auto" else [engine]
    )
    if not chosen:
        raise NotFoundError(
            "no engine is here: neither CRI-O, containerd nor podman has a program on PATH or a configuration",
            hint="install one, or name one: --engine podman",
        )
    below = runtime or next((n for n in ("runc", "crun") if facts.program(n)), "runc")
    if runtime is not None and facts.program(runtime) is None:
        raise NotFoundError(f"{runtime} is not on PATH", hint=f"apt-get install {runtime}")
    made = [ENGINES[name].plan(facts, below, store.base) for name in chosen]
    if runtime is not None:
        made.insert(0, _choose(runtime, store.base))
    return made


def _choose(runtime: str, base: Read) -> Plan:
    """[runtime] path of config.toml; every other byte of the file stays."""
    raw = base(CONFIG)
    line = f'path = "{runtime}"'
    text = raw.decode(errors="surrogateescape") if raw is not None else ""
    header = re.search(r"^\[runtime\][^\n]*\n?", text, re.MULTILINE)
    if header is None:
        after = text + ("" if not text or text.endswith("\n") else "\n") + f"[runtime]\n{line}\n"
    else:
        head, rest = text[: header.end()], text[header.end() :]
        head += "" if head.endswith("\n") else "\n"
        end = re.search(r"^\[", rest, re.MULTILINE)
        table, tail = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
        replaced, count = re.subn(r"^[ \t]*path[ \t]*=[^\n]*", line, table, count=1, flags=re.MULTILINE)
        after = head + (replaced if count else f"{line}\n{table}") + tail
    _check(text, after, runtime)
    change = Change(CONFIG, raw, after.encode(errors="surrogateescape"), whole=False)
    return Plan("cryoci", "", (change,), "nothing: cryoci-runtime reads it at the next create")


def _check(before: str, after: str, runtime: str) -> None:
    """Raise ConfigError unless `after` is `before` with another [runtime] path."""
    try:
        old: dict[str, Any] = tomllib.loads(before)
        new: dict[str, Any] = tomllib.loads(after)
        old.setdefault("runtime", {})["path"] = runtime
        right = old == new
    except (tomllib.TOMLDecodeError, AttributeError, TypeError):
        right = False
    if not right:
        raise ConfigError(
            f"{CONFIG} cannot be edited: it is broken or written in an unusual way",
            hint=f'write it by hand: [runtime] and below it path = "{runtime}"',
        )


def status(facts: Facts, store: Store) -> list[dict[str, str]]:
    """Every engine that is here: its version, whether it knows cryoci-runtime, and our files."""
    handlers = {
        "crio": checks.crio_handler,
        "containerd": checks.containerd_handler,
        "podman": checks.podman_runtime,
    }
    found = []
    for name, module in ENGINES.items():
        if not module.present(facts):
            continue
        try:
            plan = module.plan(facts, "runc", store.base)
            version, engine = plan.version, plan.engine
        except ConfigError as e:
            found.append(
                {"engine": name, "version": "", "state": "broken", "detail": e.message, "files": ""}
            )
            continue
        ours = [path for path, entry in store.files.items() if entry["engine"] == engine]
        check = handlers[name](facts)
        rancher = engine in ("k3s", "rke2") and bool(
            ours
        )  # read from a file that is generated at its next start
        active = check.verdict == "ok" or rancher
        state = (
            ("installed" if ours else "configured by hand")
            if active
            else "edited away"
            if ours
            else "not installed"
        )
        found.append({"engine": engine, "version": version, "state": state, "detail": check.found if active else "",
                      "files": ", ".join(ours)})  # fmt: skip
    return found
