# SPDX-License-Identifier: Apache-2.0
"""[devices] of config.toml: which requests for devices cryoci-runtime honours, and where CDI specifications lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cryoci.errors import ConfigError
from cryoci.shim.criu.options import unknown_key
from cryoci.shim.devices.cdi import DIRECTORIES

GPU_KINDS = ("nvidia.com/gpu", "amd.com/gpu")


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """`kinds` are those that a checkpoint may ask this node for; the first that is here is meant by numbers."""

    annotations: bool = True
    environment: bool = False
    cdi_directories: tuple[str, ...] = DIRECTORIES
    kinds: tuple[str, ...] = GPU_KINDS

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DeviceOptions:
        """Check the table [devices]. Raises ConfigError."""
        names = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in names:
                raise unknown_key(key, names, "[devices]")
            field = names[key]
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"[devices] {key} is {value!r}", hint="write true or false")
                clean[field.name] = value
                continue
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value) or not value:
                raise ConfigError(
                    f"[devices] {key} is {value!r}",
                    hint="write a list of texts, as in crio-config/config.toml",
                )
            clean[field.name] = tuple(value)
        bad = [d for d in clean.get("cdi_directories", ()) if d[0] != "/"]
        if bad:
            raise ConfigError(f"[devices] cdi-directories has {bad[0]!r}", hint="write absolute paths")
        return cls(**clean)
