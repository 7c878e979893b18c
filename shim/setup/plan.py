# SPDX-License-Identifier: Apache-2.0
"""What an installation would change: files before and after, and how their engine is asked whether it agrees."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from cryoci.errors import ConfigError
from cryoci.shim.doctor.check import Facts

HANDLER = "cryoci"  # the name of the runtime handler, and of the RuntimeClass
RUNTIME = "cryoci-runtime"
BEGIN = "# BEGIN cryoci: `cryoci uninstall` removes this block"
END = "# END cryoci"


@dataclass(frozen=True)
class Change:
    """One file: `before` is None when it is not there. `whole` says that the file is cryoci's alone."""

    path: str
    before: bytes | None
    after: bytes
    whole: bool

    def diff(self) -> str:
        """A unified diff; "" when nothing changes."""
        old = (self.before or b"").decode(errors="replace").splitlines(keepends=True)
        new = self.after.decode(errors="replace").splitlines(keepends=True)
        name = "/dev/null" if self.before is None else self.path
        lines = difflib.unified_diff(old, new, name, self.path)
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
        )


@dataclass(frozen=True)
class Plan:
    """What to do for one engine. `check` is the argv of the engine's own parser, `reload` what makes it read."""

    engine: str
    version: str
    changes: tuple[Change, ...]
    reload: str
    check: tuple[str, ...] = ()
    expects: str = ""  # what the parser's output must hold
    notes: tuple[str, ...] = field(default=())


Read = Callable[[str], bytes | None]  # a file without what an earlier installation put there


def runtime_path(facts: Facts) -> str:
    """Absolute path of cryoci-runtime, as engines need it. Raises ConfigError."""
    found = facts.program(RUNTIME)
    if found is None:
        raise ConfigError(
            f"{RUNTIME} is not on PATH, and engines need its absolute path",
            hint=f"ln -s .../site-packages/cryoci/shim/launcher.py /usr/local/bin/{RUNTIME}",
        )
    return found


def with_block(text: str, block: str) -> str:
    """`text` with cryoci's block at its end, in place of an older one. Everything else stays to the byte."""
    text = without_block(text)
    gap = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{gap}{BEGIN}\n{block.rstrip()}\n{END}\n"


def without_block(text: str) -> str:
    """`text` less cryoci's block."""
    return re.sub(rf"^{re.escape(BEGIN)}\n.*?^{re.escape(END)}\n", "", text, flags=re.MULTILINE | re.DOTALL)


def said_version(facts: Facts, program: str) -> str:
    """The first version number that `program --version` says, or ""."""
    said = facts.run(program, "--version")
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", said.text) if said and said.status == 0 else None
    return match[1] if match else ""
