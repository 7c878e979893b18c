# SPDX-License-Identifier: Apache-2.0
"""Everything that a checkpoint tells about itself: the model behind inspect, show and diff.

Its JSON form is docs/schema/inspect.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryoci.errors import CryociError, ImageError
from cryoci.ociimage import archive, catalog, compat, contents, strictjson
from cryoci.ociimage.criu import processes
from cryoci.ociimage.criu.memory import Memory
from cryoci.ociimage.criu.processes import Mount, Process, Statistics
from cryoci.ociimage.reference import LayoutRef, Reference, RegistryRef
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.progress import Progress
    from cryoci.ociimage.seal.keyring import Identities

VERSION = 1  # of the JSON form
_SEALED = "its layers are encrypted: this is what its manifest says, and --decrypt-key FILE shows the rest"
_MAX_LINE = 64 << 10  # bytes of a command line or environment


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint's parts before compression. `gpu` is AMD's; NVIDIA's lies within `memory`."""

    total: int
    memory: int
    gpu: int
    rootfs: int
    volumes: int


@dataclass(frozen=True)
class Words:
    """A process's command line and environment, which lie in its memory."""

    pid: int
    command: tuple[str, ...]
    environment: tuple[str, ...]


@dataclass(frozen=True)
class SpecMount:
    """A mount of the container's specification."""

    destination: str
    type: str
    source: str


@dataclass(frozen=True)
class Report:
    """A checkpoint. `image` is None for directories and archives; `complete` is False when layers of
    unknown content were not fetched, and then processes and sizes may be missing."""

    version: int
    reference: str
    digest: str
    manifest_digest: str
    complete: bool
    engine: str
    container: Mapping[str, str]
    base_image: Mapping[str, str]
    runtime: str
    criu: str
    host: Mapping[str, str]
    pod: Mapping[str, str]
    created: str
    checkpointed: str
    network: Mapping[str, tuple[str, ...]]
    gpu: Mapping[str, str]
    sizes: Sizes
    layers: tuple[catalog.LayerInfo, ...]
    image: catalog.ImageInfo | None
    annotations: Mapping[str, str]
    hostname: str
    processes: tuple[Process, ...]
    words: tuple[Words, ...]
    mounts: tuple[Mount, ...]
    spec_mounts: tuple[SpecMount, ...]
    statistics: Statistics | None
    files: Mapping[str, int]
    compatibility: tuple[compat.Finding, ...]
    problems: tuple[str, ...]


def inspect(
    ref: Reference,
    *,
    node: compat.Node | None = None,
    memory: bool = False,
    everything: bool = False,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> Report:
    """Look at a checkpoint, wherever it lies, without restoring any of it.

    Memory is fetched only with `memory` (for command lines and environments); layers that do not say what
    they hold only with `everything`; encrypted ones only with `identities` that open them. What is damaged inside
    of a checkpoint that can be read otherwise is in `problems`. Raises NotFoundError, ImageError, IntegrityError,
    TrustError, RegistryError.
    """
    image = None
    if isinstance(ref, (LayoutRef, RegistryRef)):
        image = catalog.inspect(ref, registry_options=registry_options)

    def with_memory(name: str) -> bool:
        return contents.is_description(name) or is_pages(name)

    keep = with_memory if memory else contents.is_description
    with contents.opened(
        ref,
        keep,
        everything=everything or memory,
        progress=progress,
        registry_options=registry_options,
        identities=identities,
    ) as found:
        return read(ref, found, image, node=node, memory=memory)


def overview(found: Report) -> dict[str, Any]:
    """What `show` prints of a checkpoint, by name."""
    return {
        "reference": found.reference,
        "container": dict(found.container),
        "base_image": dict(found.base_image),
        "runtime": found.runtime,
        "created": found.created,
        "checkpointed": found.checkpointed,
        "engine": found.engine,
        "network": found.network,
        "sizes": found.sizes,
    }


def is_pages(name: str) -> bool:
    """Whether a file holds memory of processes."""
    folder, _, base = name.rpartition("/")
    return folder in ("checkpoint", "pre-checkpoint") and base.startswith("pages-")


def read(
    ref: Reference,
    found: contents.Contents,
    image: catalog.ImageInfo | None,
    *,
    node: compat.Node | None = None,
    memory: bool = False,
) -> Report:
    """What `inspect` says, of a checkpoint that was opened by the caller."""
    problems: list[str] = [_SEALED] if found.sealed else []
    images = found.images
    facts = dict(image.facts if image else {})
    for key, value in facts_of(found).items():
        facts.setdefault(key, value)
    config, spec = (_document(found, name) for name in (archive.CONFIG, archive.SPEC))
    said = list[str]() if found.sealed else problems  # what is sealed is not damaged
    tree = _try(said, lambda: processes.read(images), list[Process]())
    mounts = _try(said, lambda: processes.mounts(images), list[Mount]())
    words = [w for p in tree if (w := _try(problems, lambda p=p: _words(found, p), None))] if memory else []
    return Report(
        VERSION,
        str(ref),
        image.digest if image else "",
        image.manifest_digest if image else "",
        found.complete,
        facts.get("engine.name", ""),
        {"name": facts.get("container.name", ""), "id": facts.get("container.id", "")},
        {key: facts.get(f"image.{key}", "") for key in ("name", "id", "digest")},
        " ".join(filter(None, (facts.get("runtime.name"), facts.get("runtime.version")))),
        facts.get("criu.version", ""),
        {key: facts.get(f"host.{key}", "") for key in ("arch", "kernel")},
        {key: facts.get(f"pod.{key}", "") for key in ("name", "namespace", "id")},
        _string(config, "createdTime"),
        facts.get("checkpointed", ""),
        _try(said, lambda: _network(found), dict[str, tuple[str, ...]]()),
        _try(said, lambda: _gpu(found, facts), dict[str, str]()),
        _sizes(found.sizes),
        image.layers if image else (),
        image,
        image.annotations if image else _strings(spec.get("annotations")),
        _try(said, lambda: processes.hostname(images), ""),
        tuple(tree),
        tuple(words),
        tuple(mounts),
        tuple(_spec_mounts(spec)),
        _try(said, lambda: processes.statistics(images), None),
        dict(sorted(found.sizes.items())),
        tuple(compat.check(facts, tree, mounts, node)) if node else (),
        tuple(problems),
    )


def _try(problems: list[str], read: Any, default: Any) -> Any:
    """What `read` gives; when the images are damaged, that is a finding and `default` the result."""
    try:
        return read()
    except (ImageError, OSError) as e:
        problems.append(e.message if isinstance(e, CryociError) else str(e))
        return default


def _words(found: contents.Contents, process: Process) -> Words | None:
    if not process.memory.areas:
        return None
    memory = Memory(found.directory, found.images, process.pid)

    def strings(span: tuple[int, int]) -> tuple[str, ...]:
        data = memory.read(*span, limit=_MAX_LINE).rstrip(b"\0")
        return tuple(part.decode(errors="replace") for part in data.split(b"\0")) if data else ()

    return Words(process.pid, strings(memory.layout.arguments), strings(memory.layout.environment))


def facts_of(found: contents.Contents) -> dict[str, str]:
    """What the descriptions among `found` say, by annotations.FACTS."""
    texts = {
        name: archive.read(found.directory / name)
        for name in archive.DESCRIPTIONS
        if (found.directory / name).is_file()
    }
    return archive.facts(texts)


def _document(found: contents.Contents, name: str) -> dict[str, Any]:
    path = found.directory / name
    if not path.is_file():
        return {}
    return strictjson.load_object(archive.read(path), name, limit=archive.MAX_JSON)


def _sizes(files: Mapping[str, int]) -> Sizes:
    def total(test: Any) -> int:
        return sum(size for name, size in files.items() if test(name))

    return Sizes(
        total(lambda name: True),
        total(is_pages),
        total(lambda name: os.path.basename(name).startswith("amdgpu-pages-")),
        total(lambda name: name in ("rootfs-diff.tar", "rootfs.tar")),
        total(lambda name: name.startswith("volumes/")),
    )


def _gpu(found: contents.Contents, facts: Mapping[str, str]) -> dict[str, str]:
    """GPUs: what the facts say, and who held how much of which, from gpu.dump."""
    result = {key.removeprefix("gpu."): value for key, value in facts.items() if key.startswith("gpu.")}
    dump = _document(found, contents.GPU)
    for key in ("engine", "driver"):
        if value := _string(dump, key):
            result.setdefault(key, value)
    for number, gpu in enumerate(_objects(dump.get("gpus"))):
        result[str(number)] = f"{_string(gpu, 'name')} {_string(gpu, 'uuid')}".strip()
    for task in _objects(dump.get("tasks")):
        held = task.get("vram")
        total = sum(n for n in held.values() if isinstance(n, int)) if isinstance(held, dict) else 0
        result[f"memory of {task.get('inner')}"] = str(total)
    return result


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _network(found: contents.Contents) -> dict[str, tuple[str, ...]]:
    """Addresses and MACs by network: podman's network.status."""
    result = {}
    for network, value in _document(found, "network.status").items():
        interfaces = value.get("interfaces") if isinstance(value, dict) else None
        words = []
        for interface in interfaces.values() if isinstance(interfaces, dict) else ():
            if isinstance(interface, dict):
                subnets = _objects(interface.get("subnets"))
                words += [_string(subnet, "ipnet") for subnet in subnets]
                words.append(_string(interface, "mac_address"))
                words += [
                    f"gateway {gateway}" for subnet in subnets if (gateway := _string(subnet, "gateway"))
                ]
        result[network] = tuple(word for word in words if word)
    return result


def _spec_mounts(spec: Mapping[str, Any]) -> list[SpecMount]:
    return [
        SpecMount(_string(m, "destination"), _string(m, "type"), _string(m, "source"))
        for m in _objects(spec.get("mounts"))
    ]


def _string(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    return text if isinstance(text, str) else ""


def _strings(value: Any) -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else ()
    return {key: text for key, text in items if isinstance(text, str)}
