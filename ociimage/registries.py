# SPDX-License-Identifier: Apache-2.0
"""What this host says about registries: containers-registries.conf(5) and containers-certs.d(5).

insecure, blocked, location and mirrors (with pull-from-mirror and mirror-by-digest-only), the longest prefix first;
a CA and a client certificate per HOST[:PORT]. As in podman, mirrors and other locations serve pulls only.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoci.errors import ConfigError, UsageError
from cryoci.ociimage import reference
from cryoci.ociimage.reference import RegistryRef

CONF = Path("/etc/containers/registries.conf")
CERTIFICATES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))


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
    mirrors: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Certificates:
    """PEM files for one registry; `client` is (certificate, key)."""

    authorities: tuple[Path, ...] = ()
    client: tuple[Path, Path] | None = field(default=None)


def find(host: str, repository: str, conf: Path | None = None) -> Entry:
    """What registries.conf says of host/repository. Raises ConfigError for a file that is broken."""
    best = Entry()
    conf = conf or CONF
    for path in [conf, *sorted(Path(f"{conf}.d").glob("*.conf"))]:
        try:
            tables = tomllib.loads(path.read_text()).get("registry", [])
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as e:
            raise ConfigError(f"cannot read {path}: {e}", hint="repair it") from e
        for table in tables if isinstance(tables, list) else []:
            entry = _entry(table) if isinstance(table, dict) else Entry()
            if (
                entry.prefix
                and _fits(entry.prefix, host, repository)
                and len(entry.prefix) >= len(best.prefix)
            ):
                best = entry
    return best


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
            place = _moved(ref, entry.prefix, str(mirror.get("location") or ""))
            found.append(Source(place, mirror.get("insecure") is True))
    place = _moved(ref, entry.prefix, entry.location) if entry.location else ref
    return [*found, Source(place, entry.insecure)]


def check(ref: RegistryRef, conf: Path | None = None) -> None:
    """Raise UsageError when registries.conf blocks the registry."""
    entry = find(ref.host, ref.repository, conf)
    if entry.blocked:
        raise UsageError(
            f"{ref.host}/{ref.repository} is blocked", hint=f"see [[registry]] {entry.prefix} in {CONF}"
        )


def certificates(host: str) -> Certificates:
    """The files of certs.d for HOST[:PORT]. Raises ConfigError for a certificate without its key."""
    for base in CERTIFICATES:
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


def _entry(table: dict[str, Any]) -> Entry:
    location = str(table.get("location") or "")
    mirrors = table.get("mirror")
    return Entry(
        str(table.get("prefix") or location),
        location,
        table.get("insecure") is True,
        table.get("blocked") is True,
        table.get("mirror-by-digest-only") is True,
        tuple(m for m in mirrors if isinstance(m, dict)) if isinstance(mirrors, list) else (),
    )


def _fits(prefix: str, host: str, repository: str) -> bool:
    name = f"{host}/{repository}/"
    if prefix.startswith("*."):
        return host.partition(":")[0].endswith(prefix[1:])
    return name.startswith(f"{prefix}/")


def _moved(ref: RegistryRef, prefix: str, location: str) -> RegistryRef:
    """`ref` with its prefix replaced by `location`."""
    rest = "" if prefix.startswith("*.") else f"{ref.host}/{ref.repository}"[len(prefix) :]
    text = f"{location}{rest or f'/{ref.repository}' * prefix.startswith('*.')}"
    text += (f":{ref.tag}" if ref.tag else "") + (f"@{ref.digest}" if ref.digest else "")
    try:
        found = reference.parse(f"docker://{text}")
    except UsageError as e:
        raise ConfigError(f"location {location!r} in {CONF} leads to no repository: {text}") from e
    assert isinstance(found, RegistryRef)
    return found
