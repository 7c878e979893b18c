# SPDX-License-Identifier: Apache-2.0
"""What the underlying runtime is: its family, its version, and whether it hands CRIU a configuration."""

import json

from cryoci.shim import paths, state, underlying

_CONFIG_FILES = (1, 26)  # first crun that hands CRIU a configuration file


class Runtime:
    """`name` is what the program calls itself; `kind` ("runc" or "crun") is the grammar it speaks."""

    __slots__ = ("name", "path", "text", "version")

    def __init__(self, path: str, name: str, text: str) -> None:
        self.path = path
        self.name = name
        self.text = text  # the version as printed: "1.1.15+ds1"
        self.version = numbers(text)

    @property
    def kind(self) -> str:
        """The grammar of `argv`: crun's, or runc's for all others."""
        return "crun" if self.name == "crun" else "runc"

    @property
    def reads_annotation(self) -> bool:
        """Does it hand CRIU the file that annotation `org.criu.config` names?"""
        return self.kind == "runc" or (self.version >= _CONFIG_FILES and libcriu_reads_files())

    @property
    def refuses_annotation(self) -> bool:
        """Is the annotation an error for it? (crun >= 1.26 with libcriu < 4.2, libcrun/criu.c.)"""
        return self.kind == "crun" and self.version >= _CONFIG_FILES and not libcriu_reads_files()


def numbers(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: "1.1.15+ds1" -> (1, 1, 15)."""
    result = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        result.append(int(digits))
        if digits != part:
            break
    return tuple(result)


def identify(path: str) -> Runtime:
    """Ask `path --version`, once per boot and binary. Raises ToolError when it does not answer."""
    stamp = underlying.stamp(path)
    cache = f"{paths.run_directory()}/runtimes/{paths.quote(path)[-200:]}.json"
    try:
        with open(cache, "rb") as f:
            saved = json.load(f)
        if saved["path"] == path and stamp is not None and saved["stamp"] == list(stamp):
            return Runtime(path, str(saved["name"]), str(saved["version"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _ask(path)
    value = {"path": path, "stamp": stamp, "name": found.name, "version": found.text}
    try:
        state.make_directory(cache.rpartition("/")[0])
        state.write(cache, json.dumps(value).encode())
    except OSError:
        pass  # rootless callers
    return found


def _ask(path: str) -> Runtime:
    from cryoci.command import run

    said = run([path, "--version"], timeout=20).stdout.decode(errors="replace")
    words = said.split("\n", 1)[0].split()
    if len(words) == 3 and words[1] == "version":
        return Runtime(path, words[0], words[2])
    return Runtime(path, path.rpartition("/")[2], "")  # another runtime; most speak runc's grammar


def libcriu_reads_files() -> bool:
    """Has the libcriu that crun would load the call for configuration files (criu >= 4.2)?"""
    import ctypes

    try:
        return hasattr(ctypes.CDLL("libcriu.so.2"), "criu_set_config_file")
    except OSError:
        return False
