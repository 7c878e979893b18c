# SPDX-License-Identifier: Apache-2.0
"""Secrets out of what is kept or shown for finding faults: words of a command line, environments, specifications."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

GONE = "[removed]"
_SECRET = re.compile(
    r"pass(?:w(?:or)?d|phrase)?|secret|token|api[-_]?key|private[-_]?key|credential|auth\b|cookie", re.I
)
# variables whose values say how a program runs and hold no secret; all others lose theirs
_PLAIN = re.compile(r"(?:PATH|LD_LIBRARY_PATH|HOME|LANG|LC_\w+|TERM|HOSTNAME|container|XDG_RUNTIME_DIR|CRYOCI_\w+|"
                    r"CRIU_\w+|NVIDIA_\w+|CUDA_\w+|NCCL_\w+|UV_USE_IO_URING|GODEBUG|KFD_\w+)\Z")  # fmt: skip
# what is a secret by its form: tokens of HTTP, JSON web tokens, private keys
_FORMS = re.compile(
    r"(?i:\b(?:bearer|authorization\W{1,8}basic)\s{1,4})[\w.~+/=-]{4,4096}"
    r"|\beyJ[\w-]{8,4096}\.[\w-]{4,4096}\.[\w-]{0,4096}"
    r"|-----BEGIN [A-Z ]{0,32}PRIVATE KEY-----[^-]{0,65536}"
)
_URL = re.compile(r"(\w{1,16}://)[^/@\s]{1,512}@")


def text(value: str) -> str:
    """Without the user and password of URLs, what follows `password=` and its like, tokens and private keys."""
    value = _FORMS.sub(GONE, _URL.sub(rf"\1{GONE}@", value))
    return re.sub(
        rf"(?i)\b([\w.-]{{0,64}}(?:{_SECRET.pattern})[\w.-]{{0,64}}\"?\s{{0,4}}[=:]\s{{0,4}})(\"[^\"]*\"|\S+)",
        rf"\1{GONE}",
        value,
    )


def words(argv: Sequence[str]) -> list[str]:
    """A command line: the value of `--password X`, `--token=X`, `-e NAME=X` and of URLs with a user is removed."""
    result: list[str] = []
    before = ""
    for word in argv:
        name, equals, _ = word.partition("=")
        if before in ("-e", "--env") and equals:
            result.append(variable(word))
        elif name in ("-e", "--env") or not equals:
            secret = before.startswith("-") and "=" not in before and bool(_SECRET.search(before))
            result.append(GONE if secret and not word.startswith("-") else text(word))
        else:
            result.append(f"{name}={GONE}" if _SECRET.search(name) else text(word))
        before = word
    return result


def variable(entry: str) -> str:
    """NAME=VALUE, with the value removed unless it is known to be plain."""
    name, equals, value = entry.partition("=")
    return (
        entry
        if _PLAIN.match(name) and not _SECRET.search(name)
        else f"{name}{equals}{GONE if value else ''}"
    )


def specification(spec: Any) -> Any:
    """An OCI specification: its environment, arguments and annotations lose their secrets."""
    return _clean(spec, "")


def _clean(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {
            k: GONE if isinstance(v, str) and _SECRET.search(k) else _clean(v, k) for k, v in value.items()
        }
    if isinstance(value, list):
        if key == "env":
            return [variable(v) if isinstance(v, str) else GONE for v in value]
        if key == "args" and all(isinstance(v, str) for v in value):
            return words(value)
        return [_clean(v, key) for v in value]
    return text(value) if isinstance(value, str) else value
