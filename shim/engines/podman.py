# SPDX-License-Identifier: Apache-2.0
"""Containers of podman.

What podman writes into its archives (config.dump, network.status) stands in its database, in the same
JSON; the database is read, never written. podman itself is asked for the rest.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoci.command import run, which
from cryoci.errors import ConflictError, NotFoundError, ToolError, UnsupportedError
from cryoci.files import read_json
from cryoci.shim import record, runtime
from cryoci.shim.engines.container import Container, Overlay, Volume

_DATABASE = "db.sql"  # in podman's graph root
OURS = "cryoci-runtime"  # as `cryoci install` names it to podman


def installed() -> bool:
    """Is there a podman on this node?"""
    try:
        which("podman")
    except NotFoundError:
        return False
    return True


def pull(reference: str) -> None:
    """Bring a base image into podman's storage. Raises NotFoundError."""
    try:
        run(["podman", "pull", "--quiet", "--", reference])
    except ToolError as e:
        raise NotFoundError(
            f"the base image {reference} is not in podman's storage and could not be pulled: {e.message}",
            hint=f"pull it yourself: podman pull {reference}",
        ) from e


def find(name: str) -> Container | None:
    """The podman container of this name or id (prefix), or None. Raises UnsupportedError, ToolError."""
    if not installed():
        return None
    asked = run(["podman", "container", "inspect", "--", name], check=False)
    if asked.returncode != 0:
        if b"no such" in asked.stderr.lower():
            return None
        raise ToolError(
            f"podman container inspect {name} failed: {asked.stderr.decode(errors='replace').strip()}"
        )
    return _container(json.loads(asked.stdout)[0])


def _container(seen: dict[str, Any]) -> Container:
    container_id = str(seen["Id"])
    config, state = _database(container_id, str(seen.get("StaticDir") or ""))
    if not seen.get("OCIConfigPath"):  # it comes with the first start
        status = (seen.get("State") or {}).get("Status", "not running")
        raise ConflictError(
            f"container {seen['Name']} is {status}; only a running container can be checkpointed",
            hint=f"start it first: podman start {seen['Name']}",
        )
    spec = read_json(seen["OCIConfigPath"])
    below = runtime.identify(_runtime(container_id, str(seen["OCIRuntime"])))
    image = _image(str(config.get("rootfsImageID", "")))
    facts = {
        "engine.name": "podman",
        "engine.version": _version(),
        # podman compares this with the name of the runtime that is to restore, so it is podman's name for it
        "runtime.name": os.path.basename(str(seen["OCIRuntime"])),
        "runtime.version": below.text,
        **image,
    }
    return Container(
        engine="podman",
        id=container_id,
        name=str(seen["Name"]),
        runtime=below.path,
        root=None,
        bundle=Path(seen["OCIConfigPath"]).parent,
        rootfs=Path(str(state.get("mountPoint") or spec["root"]["path"])),
        overlay=_overlay(seen.get("GraphDriver") or {}),
        spec=spec,
        facts={key: value for key, value in facts.items() if value},
        dumps={"config.dump": config, "network.status": state.get("networkStatus") or {}},
        volumes=tuple(
            Volume(str(mount["Name"]), Path(mount["Source"]), str(mount["Destination"]))
            for mount in seen.get("Mounts") or ()
            if mount.get("Type") == "volume" and mount.get("Name")
        ),
        shm=Path(config["ShmDir"]) if config.get("ShmDir") and not config.get("noShm") else None,
        log=Path(config["logPath"]) if config.get("logDriver") in ("k8s-file", "json-file") else None,
        auto_remove=bool((seen.get("HostConfig") or {}).get("AutoRemove")),
        pid=int((seen.get("State") or {}).get("Pid") or 0),
    )


def _runtime(container_id: str, name: str) -> str:
    """Path of the low-level runtime below podman's runtime `name`."""
    known = record.Record(None, container_id).load()
    if known is not None and not known.facts.get("adopted"):
        return str(known.facts["runtime"])
    return name if name.startswith("/") else which(name)


def _overlay(driver: dict[str, Any]) -> Overlay | None:
    data = driver.get("Data") or {}
    if driver.get("Name") != "overlay" or not data.get("UpperDir"):
        return None
    return Overlay(
        Path(data["UpperDir"]), tuple(Path(p) for p in str(data.get("LowerDir", "")).split(":") if p)
    )


def stopped_by_user(container_id: str) -> bool:
    """Whether podman was told to stop or kill the container; False when it is gone."""
    try:
        return bool(_database(container_id)[1].get("stoppedByUser"))
    except NotFoundError:
        return False


def restart_policy(container: Container) -> str:
    """podman's own restart policy of the container: no, on-failure, always or unless-stopped."""
    return str(container.dumps["config.dump"].get("restart_policy") or "no")


def closes(container: Container) -> bool:
    """Can podman restore the container with the connections closed that CRIU takes for open ones?

    It has a flag for that since 5.5; cryoci-runtime needs none (handover).
    """
    if container.facts.get("runtime.name") == OURS:
        return True
    numbers = re.match(r"(\d+)\.(\d+)", container.facts.get("engine.version", ""))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (5, 5)


@dataclass(frozen=True)
class Storage:
    """Where podman keeps its containers and images (`root`), and its named volumes."""

    root: str
    volumes: str


def storage(layer: str = "") -> Storage:
    """Podman's storage; `layer` is the directory of an image's layer in it, ROOT/overlay/ID/diff, or "".

    From podman's database there, where that is podman's only one; else podman is asked. Raises ToolError.
    """
    root, _, rest = layer.rpartition("/overlay/")
    if root and rest.endswith("/diff") and not os.path.exists(f"{root}/libpod/bolt_state.db"):
        with suppress(UnsupportedError):
            found = _row(os.path.join(root, _DATABASE), "SELECT GraphRoot, VolumeDir FROM DBConfig", ())
            if found is not None and found[0] == root and found[1]:
                return Storage(root, str(found[1]))
    info = _info()["store"]
    return Storage(str(info["graphRoot"]), str(info["volumePath"]))


def _database(container_id: str, directory: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(ContainerConfig, ContainerState) of podman's SQLite database (libpod/sqlite_state.go).

    `directory` is the container's in podman's storage, GRAPHROOT/DRIVER-containers/ID/userdata; the database is near.
    """
    found = None
    if directory.endswith(f"-containers/{container_id}/userdata"):
        found = _rows(str(Path(directory).parents[2] / _DATABASE), container_id)
    if found is None:
        path = _database_path()
        found = _rows(path, container_id)
        if found is None:
            raise NotFoundError(f"container {container_id} is not in podman's database {path}")
    return found


def _database_path() -> str:
    """Where podman says that its database is."""
    info = _info()
    backend = info["host"].get("databaseBackend")
    path = os.path.join(info["store"]["graphRoot"], _DATABASE)
    if backend != "sqlite" or not os.path.exists(path):
        raise UnsupportedError(
            f"podman keeps its containers in a {backend or 'unknown'} database, which cryoci does not read",
            hint="move it to SQLite: podman system migrate (podman 5), or use podman's own "
            "`podman container checkpoint --export FILE` and `cryoci push FILE REFERENCE`",
        )
    return path


def _info() -> dict[str, Any]:
    """What podman says of itself; for that it asks dpkg for the version of all that it uses, in 17 processes."""
    info: dict[str, Any] = json.loads(run(["podman", "info", "--format=json"]).stdout)
    return info


def _rows(path: str, container_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What a database has of the container; None when there is no such database or container."""
    config = _row(path, "SELECT JSON FROM ContainerConfig WHERE ID = ?", (container_id,))
    state = _row(path, "SELECT JSON FROM ContainerState WHERE ID = ?", (container_id,))
    return (
        (json.loads(config[0]), json.loads(state[0])) if config is not None and state is not None else None
    )


def _row(path: str, query: str, words: tuple[str, ...]) -> tuple[Any, ...] | None:
    """The first row that a query finds in a database, or None. Raises UnsupportedError."""
    if not os.path.exists(path):
        return None
    database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
    try:
        row: tuple[Any, ...] | None = database.execute(query, words).fetchone()
    except sqlite3.Error as e:
        raise UnsupportedError(f"podman's database {path} cannot be read: {e}") from e
    finally:
        database.close()
    return row


def _image(image_id: str) -> dict[str, str]:
    """Facts about the base image: how another node finds the very same one."""
    if not image_id:
        return {}
    asked = run(["podman", "image", "inspect", "--", image_id], check=False)
    if asked.returncode != 0:
        return {}  # the image was removed by force while the container lives
    image = json.loads(asked.stdout)[0]
    remote = [digest for digest in image.get("RepoDigests") or () if not digest.startswith("localhost/")]
    return {
        "image.digest": str(image.get("Digest", "")),
        "image.reference": remote[0] if remote else "",
    }


def _version() -> str:
    words = run(["podman", "--version"]).stdout.decode().split()
    return words[-1] if words else ""
