# SPDX-License-Identifier: Apache-2.0
"""/etc/cryoci/config.toml: read, check, and remember for the next call.

Every key is documented in crio-config/config.toml. The calls that only pass through never come here
while config.cache is fresh.
"""

from __future__ import annotations

import dataclasses
import tomllib
from typing import Any

from cryoci.errors import ConfigError, NotFoundError
from cryoci.shim import paths, state, underlying
from cryoci.shim.criu import conf
from cryoci.shim.criu.options import CriuOptions, unknown_key
from cryoci.shim.devices.options import DeviceOptions
from cryoci.shim.gpu.amd import AmdOptions
from cryoci.shim.memory.settings import Settings

_LIMIT = 1 << 20


GPU_ENGINES = ("driver", "plugin", "none")


@dataclasses.dataclass(frozen=True)
class GpuSettings:
    """[gpu]: who drives CUDA, the seconds that a lock may wait for work on a GPU to end, gpu/prefault.py."""

    engine: str = "driver"
    lock_timeout: int = 60
    prefault: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """What the file says. `runtime` is a program's name or absolute path, None for the default search."""

    runtime: str | None = None
    criu: CriuOptions = dataclasses.field(default_factory=CriuOptions)
    gpu: GpuSettings = dataclasses.field(default_factory=GpuSettings)
    devices: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    amd: AmdOptions = dataclasses.field(default_factory=AmdOptions)
    memory: Settings = dataclasses.field(default_factory=Settings)


def load(path: str | None = None) -> Config:
    """Parse and check the configuration; a file that is absent means all defaults.

    Raises ConfigError with the file, the key and what to write instead.
    """
    path = path or paths.config_file()
    try:
        with open(path, "rb") as f:
            raw = f.read(_LIMIT + 1)
    except FileNotFoundError:
        return Config()
    except OSError as e:
        raise ConfigError(
            f"cannot read {path}: {e.strerror}", hint="it must be a file that root can read"
        ) from e
    if len(raw) > _LIMIT:
        raise ConfigError(
            f"{path} is larger than {_LIMIT} bytes", hint="it is not a configuration of cryoci"
        )
    try:
        return parse(tomllib.loads(raw.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(
            f"{path} is not valid TOML: {e}", hint="see the commented sample, crio-config/config.toml"
        ) from e
    except ConfigError as e:
        raise ConfigError(f"{path}: {e.message}", hint=e.hint) from e


def parse(values: dict[str, Any]) -> Config:
    """Check parsed TOML. Raises ConfigError."""
    tables = {
        "runtime": {"path": str},
        "criu": None,
        "gpu": None,
        "devices": None,
        "amd": None,
        "memory": None,
    }
    for name, table in values.items():
        if name not in tables:
            raise unknown_key(name, tables, "the file")
        if not isinstance(table, dict):
            raise ConfigError(f"{name!r} is a value, not a table", hint=f"write [{name}] and its keys below")
    runtime = values.get("runtime", {})
    for key in runtime:
        if key != "path":
            raise unknown_key(key, {"path": str}, "[runtime]")
    path = runtime.get("path")
    if path is not None and (
        not isinstance(path, str)
        or not path
        or ("/" in path and path[0] != "/")
        or not path.isprintable()
        or path in (".", "..")
    ):
        raise ConfigError(
            f"[runtime] path is {path!r}", hint='write a name such as "runc", or an absolute path'
        )
    return Config(
        path,
        CriuOptions.from_mapping(values.get("criu", {})),
        _gpu(values.get("gpu", {})),
        DeviceOptions.from_mapping(values.get("devices", {})),
        AmdOptions.from_mapping(values.get("amd", {})),
        Settings.from_mapping(values.get("memory", {})),
    )


def _gpu(table: dict[str, Any]) -> GpuSettings:
    known = {"engine": GPU_ENGINES, "lock-timeout": int, "prefault": bool}
    for key in table:
        if key not in known:
            raise unknown_key(key, known, "[gpu]")
    engine = table.get("engine", "driver")
    if engine not in GPU_ENGINES:
        raise ConfigError(f"[gpu] engine is {engine!r}", hint=f"write one of {', '.join(GPU_ENGINES)}")
    timeout = table.get("lock-timeout", GpuSettings.lock_timeout)
    if not isinstance(timeout, int) or isinstance(timeout, bool) or not 1 <= timeout <= 86400:
        raise ConfigError(
            f"[gpu] lock-timeout is {timeout!r}", hint="write a whole number of seconds from 1 to 86400"
        )
    prefault = table.get("prefault", GpuSettings.prefault)
    if not isinstance(prefault, bool):
        raise ConfigError(f"[gpu] prefault is {prefault!r}", hint="write true or false")
    return GpuSettings(engine, timeout, prefault)


def resolve(config: Config, launcher: str) -> str:
    """Absolute path of the underlying runtime. Raises ConfigError, NotFoundError."""
    if config.runtime is None:
        return underlying.default(launcher)
    if config.runtime.startswith("/"):
        if underlying.is_self(config.runtime, launcher):
            raise ConfigError(
                f"{paths.config_file()}: [runtime] path {config.runtime} is cryoci-runtime itself",
                hint="name the runtime that it stands in front of, runc or crun",
            )
        if underlying.is_program(config.runtime):
            return config.runtime
        raise NotFoundError(
            f"{paths.config_file()}: [runtime] path {config.runtime} is not a program",
            hint="install that runtime, or name another",
        )
    found = underlying.search(config.runtime, launcher)
    if found is None:
        raise NotFoundError(
            f"{paths.config_file()}: [runtime] path {config.runtime!r} is no program on PATH",
            hint="install that runtime, or write its absolute path (cryoci-runtime itself does not count)",
        )
    return found


def refresh(launcher: str) -> str:
    """Load the configuration and write config.cache; returns the path of the underlying runtime.

    Raises ConfigError, NotFoundError. A cache that cannot be written costs time, nothing else.
    """
    before = underlying.stamp(paths.config_file())
    config = load()
    runtime = resolve(config, launcher)
    if before is not None and before == underlying.stamp(paths.config_file()):
        text = (
            f"cryoci config 1\n{' '.join(map(str, before))}\n{runtime}\n\n{conf.render(config.criu, 'dump')}"
        )
        try:
            state.make_directory(paths.run_directory())
            state.write(paths.run_directory() + "/config.cache", text.encode("utf-8", "surrogateescape"))
        except OSError:
            pass  # rootless callers
    return runtime
