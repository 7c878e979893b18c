# SPDX-License-Identifier: Apache-2.0
"""What this host says about registries: containers-registries.conf(5) and containers-certs.d(5).

insecure, blocked, location and mirrors (with pull-from-mirror and mirror-by-digest-only), the longest prefix first;
a CA and a client certificate per HOST[:PORT]. As in podman, mirrors and other locations serve pulls only, and what a
user has in ~/.config/containers comes before what the host has.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoci.errors import ConfigError, UsageError
from cryoci.ociimage import reference
from cryoci.ociimage.reference import RegistryRef

CONF = Path("/etc/containers/registries.conf")
CERTIFICATES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
_OWN = ".config/containers"  # below $HOME


@dataclass(frozen=True)
class Source:
    """A place to pull from; `insecure` allows plain HTTP and any certificate."""

    ref: RegistryRef
    insecure: bool


@dataclass(frozen=True)
class Entry:
    """The [[registry]] table of the longest prefix that fits."""

    prefix: str = ""
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    digest_only: bool = False
    source: Path = CONF
    mirrors: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Certificates:
    """PEM files for one registry; `client` is (certificate, key)."""

    authorities: tuple[Path, ...] = ()
    client: tuple[Path, Path] | None = field(default=None)


def find(host: str, repository: str, conf: Path | None = None) -> Entry:
    """What registries.conf says of host/repository. Raises ConfigError for a file that is broken."""
    best = Entry()
    for path in _files() if conf is None else [conf, *_more(conf)]:
        try:
            tables = tomllib.loads(path.read_text()).get("registry", [])
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as e:
            raise ConfigError(f"cannot read {path}: {e}", hint="repair it") from e
        for table in tables if isinstance(tables, list) else []:
            entry = _entry(table, path) if isinstance(table, dict) else Entry()
            if (
                entry.prefix
                and _fits(entry.prefix, host, repository)
                and len(entry.prefix) >= len(best.prefix)
            ):
                best = entry
    return best


def _files() -> list[Path]:
    """What is read, in order: a user's own file stands for the host's and its drop-ins."""
    own = Path(os.environ.get("HOME") or "/nonexistent", _OWN, CONF.name)
    if named := os.environ.get("CONTAINERS_REGISTRIES_CONF"):
        return [Path(named), *_more(CONF), *_more(own)]
    return [own, *_more(own)] if own.exists() else [CONF, *_more(CONF), *_more(own)]


def _more(conf: Path) -> list[Path]:
    return sorted(Path(f"{conf}.d").glob("*.conf"))


def sources(ref: RegistryRef, conf: Path | None = None) -> list[Source]:
    """Where to pull `ref` from, in order: mirrors that serve such a reference, then its location.

    Raises UsageError when it is blocked, ConfigError.
    """
    entry = find(ref.host, ref.repository, conf)
    check(ref, conf)
    found = []
    for mirror in entry.mirrors:
        kind = str(mirror.get("pull-from-mirror") or ("digest-only" if entry.digest_only else "all"))
        if kind == "all" or (kind == "digest-only") == (ref.digest is not None):
            place = _moved(ref, entry, str(mirror.get("location") or ""))
            found.append(Source(place, mirror.get("insecure") is True))
    place = _moved(ref, entry, entry.location) if entry.location else ref
    return [*found, Source(place, entry.insecure)]


def check(ref: RegistryRef, conf: Path | None = None) -> None:
    """Raise UsageError when registries.conf blocks the registry."""
    entry = find(ref.host, ref.repository, conf)
    if entry.blocked:
        raise UsageError(
            f"{ref.host}/{ref.repository} is blocked",
            hint=f"see [[registry]] {entry.prefix} in {entry.source}",
        )


def certificates(host: str) -> Certificates:
    """The files of certs.d for HOST[:PORT]. Raises ConfigError for a certificate without its key."""
    home = os.environ.get("HOME")
    for base in ((Path(home, _OWN, "certs.d"),) if home else ()) + CERTIFICATES:
        directory = base / host
        if not directory.is_dir():
            continue
        pairs = []
        for certificate in sorted(directory.glob("*.cert")):
            key = certificate.with_suffix(".key")
            if not key.is_file():
                raise ConfigError(f"{certificate} has no key beside it", hint=f"put it at {key}")
            pairs.append((certificate, key))
        return Certificates(tuple(sorted(directory.glob("*.crt"))), pairs[0] if pairs else None)
    return Certificates()


def _entry(table: dict[str, Any], source: Path) -> Entry:
    location = str(table.get("location") or "")
    mirrors = table.get("mirror")
    return Entry(
        str(table.get("prefix") or location),
        location,
        table.get("insecure") is True,
        table.get("blocked") is True,
        table.get("mirror-by-digest-only") is True,
        source,
        tuple(m for m in mirrors if isinstance(m, dict)) if isinstance(mirrors, list) else (),
    )


def _fits(prefix: str, host: str, repository: str) -> bool:
    name = f"{host}/{repository}/"
    if prefix.startswith("*."):
        return host.partition(":")[0].endswith(prefix[1:])
    return name.startswith(f"{prefix}/")


def _moved(ref: RegistryRef, entry: Entry, location: str) -> RegistryRef:
    """`ref` with the prefix of `entry` replaced by `location`."""
    prefix = entry.prefix
    rest = "" if prefix.startswith("*.") else f"{ref.host}/{ref.repository}"[len(prefix) :]
    text = f"{location}{rest or f'/{ref.repository}' * prefix.startswith('*.')}"
    text += (f":{ref.tag}" if ref.tag else "") + (f"@{ref.digest}" if ref.digest else "")
    try:
        found = reference.parse(f"docker://{text}")
    except UsageError as e:
        raise ConfigError(f"location {location!r} in {entry.source} leads to no repository: {text}") from e
    assert isinstance(found, RegistryRef)
    return found
