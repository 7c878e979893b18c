# SPDX-License-Identifier: Apache-2.0
"""CRIU options that engines cannot pass: pure data, checked once at the door."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from cryoci.errors import ConfigError

NETWORK_LOCKS = ("iptables", "nftables", "skip")
CGROUP_MODES = ("none", "props", "soft", "full", "strict", "ignore")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class CriuOptions:
    """Options for one dump or restore. None (or empty) leaves CRIU's default or the engine's choice.

    A switch that is True is forced on and one that is False forced off, whatever the engine asked
    for: CRIU evaluates this configuration after the request (criu(8), "Configuration files in RPC mode").
    """

    tcp_established: bool | None = None
    tcp_close: bool | None = None
    skip_in_flight: bool | None = None
    file_locks: bool | None = None
    ext_unix_sk: bool | None = None
    shell_job: bool | None = None
    link_remap: bool | None = None
    ghost_limit: int | None = None  # bytes of a deleted file that may go into the image
    timeout: int | None = None  # seconds to collect the processes at dump
    network_lock: str | None = None
    manage_cgroups: str | None = None
    external: tuple[str, ...] = ()
    libdir: str | None = None  # CRIU's plugin directory
    log_level: int | None = None  # 0 to 4

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str = "[criu]") -> CriuOptions:
        """Check `values`, keyed as in config.toml ("tcp-established"). Raises ConfigError naming `where`."""
        names = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in names:
                raise unknown_key(key, names, where)
            field = names[key]
            clean[field.name] = _check(field.name, str(field.type), value, f"{where} {key}")
        return cls(**clean)

    def to_mapping(self) -> dict[str, Any]:
        """What is set, keyed as in config.toml; `from_mapping` reads it back."""
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value != ():
                result[field.name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
        return result

    def merge(self, other: CriuOptions) -> CriuOptions:
        """These options overridden by what `other` sets; `external` adds up."""
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(other, field.name)
            if field.name == "external":
                changes["external"] = tuple(dict.fromkeys((*self.external, *value)))
            elif value is not None:
                changes[field.name] = value
        return dataclasses.replace(self, **changes)


def unknown_key(key: str, known: Mapping[str, Any], where: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return ConfigError(f"unknown key {key!r} in {where}", hint=hint)


def parse_size(value: Any, where: str) -> int:
    """Bytes from an integer or a text such as "1M" (K, M, G: powers of 1024). Raises ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str):
        number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
        if number.isascii() and number.isdigit() and unit in _UNITS:
            return int(number) * _UNITS[unit]
    raise ConfigError(
        f"{where} is {value!r}, not a size", hint='write bytes or a text such as "512K", "1M", "2G"'
    )


def _check(name: str, kind: str, value: Any, where: str) -> Any:
    if name == "ghost_limit":
        size = parse_size(value, where)
        if size >= 1 << 32:
            raise ConfigError(
                f"{where} is {value!r}: CRIU takes less than 4G", hint='the usual limit is "1M" to "1G"'
            )
        return size
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise ConfigError(
                f"{where} is {value!r}, not a switch", hint="write true or false, without quotes"
            )
        return value
    if kind.startswith("int"):
        low, high = (0, 4) if name == "log_level" else (1, 86400)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{where} is {value!r}", hint=f"write a whole number from {low} to {high}")
        return value
    if name == "external":
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{where} is {value!r}, not a list of texts", hint='write ["mnt[/data]:data"]')
        return tuple(_line(v, where) for v in value)
    allowed = {"network_lock": NETWORK_LOCKS, "manage_cgroups": CGROUP_MODES}.get(name)
    if not isinstance(value, str) or (allowed and value not in allowed):
        choices = f"one of {', '.join(allowed)}" if allowed else "a text"
        raise ConfigError(f"{where} is {value!r}", hint=f"write {choices}")
    if name == "libdir" and not value.startswith("/"):
        raise ConfigError(f"{where} is {value!r}, not an absolute path", hint='CRIU ships "/usr/lib/criu"')
    return _line(value, where)


def _line(value: str, where: str) -> str:
    # CRIU's parser (criu/config.c, parse_statement) cuts a value at "#" even inside quotes and miscounts
    # blanks behind escapes, so a value with any of these would silently become another one.
    if not value or not value.isprintable() or any(c in value for c in ' "#\\'):
        raise ConfigError(
            f"{where}: CRIU's configuration file cannot carry {value!r}",
            hint='write it without blanks and without any of " # \\',
        )
    return value
