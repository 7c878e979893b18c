# SPDX-License-Identifier: Apache-2.0
"""Which devices a container asks for: by annotation, or by the variable that NVIDIA's images set.

    io.cryoci.gpus           all | none | 0,1 | GPU-<uuid>,... | vendor/class=name,...
    cdi.k8s.io/*             vendor/class=name,...   (CDI's own annotations, as CRI-O and containerd read them)
    NVIDIA_VISIBLE_DEVICES   as io.cryoci.gpus; "void" and "" are none (only when config.toml allows it)

The first that is there decides.
"""

from __future__ import annotations

from typing import Any

from cryoci.errors import NotFoundError, UnsupportedError, UsageError
from cryoci.shim.devices import cdi
from cryoci.shim.devices.options import DeviceOptions

GPUS = "io.cryoci.gpus"
CDI = "cdi.k8s.io/"
VISIBLE = "NVIDIA_VISIBLE_DEVICES"
_NONE = ("none", "void", "")


def words(spec: dict[str, Any], options: DeviceOptions) -> list[str]:
    """What is asked for, as written; [] for nothing. Raises UsageError for a CDI annotation that is none."""
    noted = spec.get("annotations")
    noted = noted if isinstance(noted, dict) else {}
    if options.annotations:
        if isinstance(noted.get(GPUS), str):
            return _split(noted[GPUS])
        found = []
        for key, text in noted.items():
            if key.startswith(CDI) and isinstance(text, str):
                for name in _split(text):
                    if cdi.split(name) is None:
                        raise UsageError(
                            f"annotation {key} has {name!r}, which is no CDI device",
                            hint="write vendor/class=name, as `cryoci cdi list` shows them",
                        )
                    found.append(name)
        if found:
            return found
    if options.environment:
        process = spec.get("process")
        env = process.get("env") if isinstance(process, dict) else None
        for variable in reversed(env or []):  # the last one counts
            if isinstance(variable, str) and variable.startswith(VISIBLE + "="):
                return _split(variable.partition("=")[2])
    return []


def _split(text: str) -> list[str]:
    found = [word.strip() for word in text.split(",")]
    return [] if len(found) == 1 and found[0].lower() in _NONE else [word for word in found if word]


def names(asked: list[str], registry: cdi.Registry, kinds: tuple[str, ...]) -> list[str]:
    """Full CDI names for what is asked. Raises UnsupportedError for MIG, NotFoundError when there is no GPU."""
    found: list[str] = []
    for word in asked:
        if cdi.split(word):
            found.append(word)
            continue
        if word.upper().startswith("MIG-") or ":" in word:
            raise UnsupportedError(
                f"the container asks for {word}, a MIG device, and no driver can checkpoint those",
                hint="give it a whole GPU, or turn MIG off: nvidia-smi -mig 0",
            )
        kind = next((k for k in kinds if registry.of_kind(k)), None)
        if kind is None:
            raise NotFoundError(
                f"the container asks for GPU {word}, and this node has none"
                + "".join(f"; {problem}" for problem in registry.problems),
                hint="see that the driver is loaded (nvidia-smi); `cryoci cdi list` shows what can be asked for",
            )
        if word == "all" and f"{kind}=all" not in registry.devices:
            found += [d.qualified for d in registry.of_kind(kind)]
        else:
            found.append(f"{kind}={word}")
    return list(dict.fromkeys(found))
