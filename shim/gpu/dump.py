# SPDX-License-Identifier: Apache-2.0
"""gpu.dump: what the GPU part of a checkpoint was, as flat JSON beside CRIU's images (docs/gpu.dump.schema.json).

Every engine archives it unchanged, since it lies in the image directory. It is read from archives too, so it is
checked there like all that comes from one: it only ever chooses among what this node has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cryoci.errors import ImageError
from cryoci.files import write_json
from cryoci.shim.gpu.nvml import Gpu, uuid_bytes
from cryoci.shim.gpu.select import Wanted
from cryoci.shim.gpu.tasks import Task

NAME = "gpu.dump"
VERSION = 1
_LIMIT = 1 << 20  # bytes
_MOST = 4096  # tasks


@dataclass
class Dump:
    """`gpus` are all that the container saw, in this node's order, `tasks` its CUDA processes.

    `driver` is the kernel driver's version, `cuda` what cuDriverGetVersion says. `devices` are the CDI names
    that the container was given.
    """

    driver: str
    cuda: int
    gpus: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    engine: str = "driver"
    criu: int = 0
    plugins: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "version": VERSION,
            "engine": self.engine,
            "driver": self.driver,
            "cuda": self.cuda,
            "gpus": self.gpus,
            "tasks": [task.to_json() for task in self.tasks],
            "flags": self.flags,
            "devices": self.devices,
            "criu": self.criu,
            "plugins": self.plugins,
        }

    @classmethod
    def from_json(cls, value: Any) -> Dump:
        """Raises ImageError for what does not follow the schema."""
        try:
            if value["version"] != VERSION:
                raise ImageError(
                    f"{NAME} is of version {value['version']!r}, which this cryoci does not know",
                    hint="upgrade cryoci",
                )
            gpus = [_gpu(one) for one in value["gpus"]]
            tasks = [Task.from_json(one) for one in value["tasks"][:_MOST]]
            return cls(
                driver=str(value["driver"])[:64],
                cuda=int(value["cuda"]),
                gpus=gpus,
                tasks=tasks,
                flags={str(k)[:64]: bool(v) for k, v in dict(value.get("flags") or {}).items()},
                devices=[str(one)[:256] for one in value.get("devices") or []],
                engine=str(value.get("engine"))[:16],
                criu=int(value.get("criu") or 0),
                plugins=[str(one)[:64] for one in value.get("plugins") or []],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise ImageError(f"{NAME} of the checkpoint is not valid: {type(e).__name__}: {e}") from e

    @property
    def wanted(self) -> list[Wanted]:
        """Every GPU that the container saw, and the bytes that its processes held there."""
        return [
            Wanted(gpu["uuid"], gpu["name"], sum(task.vram.get(gpu["uuid"], 0) for task in self.tasks))
            for gpu in self.gpus
        ]

    def write(self, directory: str) -> None:
        """Write it into CRIU's image directory. Raises OSError."""
        write_json(os.path.join(directory, NAME), self.to_json())


def describe(gpu: Gpu) -> dict[str, Any]:
    """A GPU as gpu.dump has it."""
    return {
        "uuid": gpu.uuid,
        "name": gpu.name,
        "index": gpu.index,
        "minor": gpu.minor,
        "capability": gpu.capability,
        "memory": gpu.memory,
    }


def made(driver: str, cuda: int, gpus: Sequence[Gpu], tasks: Sequence[Task], **more: Any) -> Dump:
    """A Dump of what is there now."""
    return Dump(driver, cuda, [describe(gpu) for gpu in gpus], list(tasks), **more)


def read(directory: str) -> Dump | None:
    """gpu.dump of an image directory; None when there is none. Raises ImageError."""
    try:
        fd = os.open(os.path.join(directory, NAME), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ImageError(f"{NAME} of the checkpoint cannot be read: {e.strerror}") from e
    with os.fdopen(fd, "rb") as f:
        raw = f.read(_LIMIT + 1)
    try:
        if len(raw) > _LIMIT:
            raise ValueError(f"larger than {_LIMIT} bytes")
        return Dump.from_json(json.loads(raw))
    except (ValueError, RecursionError) as e:
        raise ImageError(f"{NAME} of the checkpoint is not valid: {e}") from e


def _gpu(value: Any) -> dict[str, Any]:
    uuid_bytes(str(value["uuid"]))
    return {
        "uuid": str(value["uuid"]),
        "name": str(value["name"])[:96],
        "index": int(value["index"]),
        "minor": int(value["minor"]),
        "capability": str(value["capability"])[:8],
        "memory": int(value["memory"]),
    }
