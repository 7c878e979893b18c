# SPDX-License-Identifier: Apache-2.0
"""Everything that is known of a container's last failed dump or restore, as one tar without secrets.

No memory, no files of the container, no values of its environment but those known to be plain.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

from cryoci import __version__, redact
from cryoci.shim import attempts, hooked
from cryoci.shim.bundle import ORIGINAL
from cryoci.shim.criu import log, pauses
from cryoci.shim.doctor import node
from cryoci.shim.doctor.check import Facts
from cryoci.shim.gpu import states, tasks

LIMIT = 16 << 20  # bytes of one file
_PROCESSES = 256


class _Tar:
    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self._file = tarfile.open(path, "w:gz")  # noqa: SIM115 (closed by close)

    def add(self, name: str, data: bytes | str) -> None:
        raw = data.encode(errors="replace") if isinstance(data, str) else data
        info = tarfile.TarInfo(f"cryoci-debug/{name}")
        info.size, info.mode, info.mtime = len(raw), 0o600, int(time.time())
        self._file.addfile(info, io.BytesIO(raw))
        self.names.append(name)

    def json(self, name: str, value: Any) -> None:
        self.add(name, json.dumps(value, indent=1, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


def collect(container: str, output: Path) -> list[str]:
    """Write the tar; returns the names in it. `container` is a name, an id, or the beginning of one.

    Raises NotFoundError when nothing is known of it, OSError when `output` cannot be written.
    """
    directory = attempts.directory(container)
    identity = directory.rpartition("/")[2]
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    try:
        tar = _Tar(temporary)
        try:
            _fill(tar, directory, identity)
        finally:
            tar.close()
        temporary.rename(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return tar.names


def _fill(tar: _Tar, directory: str, identity: str) -> None:
    facts: dict[str, Any] = {}
    for name in sorted(os.listdir(directory)):
        raw = _read(f"{directory}/{name}")
        if name == "record.json":
            facts = _object(raw)
        try:
            tar.json(f"record/{name}", redact.specification(json.loads(raw)))
        except ValueError:
            tar.add(f"record/{name}", redact.text(raw))
        if name in ("dump.log", "restore.log"):
            cause = log.explain_text(raw, log.verb_of(raw, name), anywhere=True)
            tar.json(f"record/{name}.cause.json", None if cause is None else vars(cause))
            tar.json(f"record/{name}.timeline.json", pauses.longest(redact.text(raw)))
    _specification(tar, str(facts.get("spec") or ""))
    note = hooked.path(identity)
    if note is not None and os.path.exists(note):
        tar.json("hooked.json", redact.specification(_object(_read(note))))
    _processes(tar, facts)
    node_facts = Facts()
    tar.json("doctor.json", node.report("node", node.examine(node_facts)))
    for name, argv in (("nvidia-smi.txt", ("nvidia-smi",)), ("rocm-smi.txt", ("rocm-smi",))):
        said = node_facts.run(*argv)
        if said is not None:
            tar.add(f"gpu/{name}", said.text)
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    about = {"schema": "io.cryoci.debug/1", "cryoci": __version__, "container": identity, "written": written}
    tar.json("about.json", {**about, "uname": list(os.uname())})


def _object(raw: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _specification(tar: _Tar, path: str) -> None:
    """config.json as the engine wrote it and as the runtime got it, and what cryoci changed."""
    texts = []
    for name, source in (("before", path + ORIGINAL), ("after", path)):
        try:
            value = redact.specification(json.loads(_read(source)))
        except ValueError:
            continue
        texts.append(json.dumps(value, indent=1, sort_keys=True).splitlines(keepends=True))
        tar.json(f"config/{name}.json", value)
    if len(texts) == 2:
        diff = difflib.unified_diff(texts[0], texts[1], "before", "after")
        tar.add("config/changes.diff", "".join(diff))


def _processes(tar: _Tar, facts: dict[str, Any]) -> None:
    """/proc of the container's processes, while it runs."""
    try:
        first = int(_read(str(facts.get("pid_file") or "")).strip())
    except ValueError:
        return
    if not os.path.exists(f"/proc/{first}"):
        return
    tar.add("proc/mountinfo", redact.text(_read(f"/proc/{first}/mountinfo")))
    for pid in tasks.members(first)[:_PROCESSES]:
        for name in ("maps", "status", "wchan", "cgroup"):
            tar.add(f"proc/{pid}/{name}", _read(f"/proc/{pid}/{name}"))
        words = _read(f"/proc/{pid}/cmdline").rstrip("\0").split("\0")
        links = {}
        for fd in _names(f"/proc/{pid}/fd"):
            try:
                links[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
        tar.json(f"proc/{pid}/process.json", {"cmdline": redact.words(words), "fds": links})
    if held := states.ask(first):
        tar.json("gpu/states.json", held)


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _read(path: str) -> str:
    """The end of a file as text; "" when it cannot be read."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            f.seek(max(0, size - LIMIT))
            return f.read(LIMIT).decode(errors="replace")
    except (OSError, ValueError):
        return ""
