# SPDX-License-Identifier: Apache-2.0
"""/etc/cryoci/policy.toml: whose signature an image needs before any byte of it is given to CRIU.

    mode = "warn"                              # warn (default), strict, or off

    [[rule]]                                   # the first rule that matches decides
    match = "registry.example:5000/prod/*"     # HOST/REPOSITORY, oci:/LAYOUT:NAME, or /PATH; * crosses slashes
    keys = ["keys/prod.pub"]                   # a signature by one of them; paths are relative to this file
    provenance = true                          # and a signed statement of where it comes from
    mode = "strict"                            # for this rule alone

    [[rule]]
    match = "ghcr.io/team/*"                   # or a signature by one of these, vouched for by certificate
    identities = [{ subject = "https://github.com/team/app/.github/workflows/*", issuer = "https://token.actions..." }]
    roots = ["trusted_root.json"]              # authorities and logs that count: PEM, or sigstore's trusted root

    [[rule]]
    match = "oci:/var/lib/cryoci/images:*"
    accept = true                              # needs no signature

strict refuses what is not vouched for; warn says so and goes on. A policy that cannot be read refuses everything.
"""

from __future__ import annotations

import fnmatch
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryoci.errors import ConfigError, TrustError, UsageError
from cryoci.ociimage import blob, stores
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef, LayoutRef, Reference, RegistryRef
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    from cryoci.ociimage.trust.identity import Keyless

PATH = Path("/etc/cryoci/policy.toml")
MODES = ("warn", "strict", "off")
MAX_FILE = 1 << 20  # bytes


@dataclass(frozen=True)
class Rule:
    """What images whose name matches need."""

    match: str
    keys: tuple[Path, ...] = ()
    identities: tuple[tuple[str, str], ...] = ()  # subject and issuer
    roots: tuple[Path, ...] = ()
    accept: bool = False
    provenance: bool = False
    mode: str | None = None


@dataclass(frozen=True)
class Policy:
    """The rules of a node; `source` is where they stand, None when there is no file."""

    mode: str = "warn"
    rules: tuple[Rule, ...] = ()
    source: Path | None = None

    def rule(self, name: str) -> Rule | None:
        """The first rule that matches `name`."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(name, rule.match)), None)


@dataclass(frozen=True)
class Verdict:
    """What the policy says of an image: `warning` is empty when it is vouched for or needs nobody."""

    name: str
    digest: str | None
    signers: tuple[str, ...] = ()
    warning: str = ""


@dataclass
class Gate:
    """`enforce` for one transfer: called with the digest that is about to be fetched, it keeps its verdict."""

    ref: Reference
    options: RegistryOptions | None = None
    verdict: Verdict | None = field(default=None, init=False)

    def __call__(self, store: blob.Store | None, digest: str | None) -> None:
        self.verdict = enforce(self.ref, digest, store=store, registry_options=self.options)


def load(path: Path | None = None) -> Policy:
    """Read the policy; none is there: warn. Raises ConfigError, also when others than its owner may write it."""
    path = path or PATH
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
                raise ConfigError(
                    f"{path} can be changed by others than its owner",
                    hint=f"chown root {path} && chmod go-w {path}",
                )
            value = tomllib.loads(file.read(MAX_FILE).decode())
    except FileNotFoundError:
        return Policy()
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {path}: {e}", hint="repair it; until then nothing is trusted") from e
    _known(value, ("mode", "rule"), str(path))
    rules = value.get("rule", [])
    if not isinstance(rules, list):
        raise ConfigError(f"{path}: rule is not a list of tables", hint="write [[rule]]")
    mode = _mode(value.get("mode", "warn"), str(path))
    return Policy(mode, tuple(_rule(r, i, path) for i, r in enumerate(rules, 1)), path)


def enforce(
    ref: Reference,
    digest: str | None,
    *,
    store: blob.Store | None = None,
    policy: Policy | None = None,
    registry_options: RegistryOptions | None = None,
) -> Verdict:
    """Hold the image `digest` at `ref` against the policy (default: the node's).

    Call it before anything of the image is used, and then use that digest alone. `digest` is None for directories
    and archives, which nobody can sign. `store` saves opening it again. Raises TrustError when the policy is strict
    and the image is not vouched for, ConfigError, RegistryError.
    """
    policy = load() if policy is None else policy
    name = name_of(ref)
    rule = policy.rule(name)
    mode = (rule.mode if rule else None) or policy.mode
    if mode == "off" or (rule and rule.accept):
        return Verdict(name, digest)
    where = policy.source or PATH
    if rule is None:
        # a layout or directory is this node's own until a policy says otherwise
        if mode == "warn" and (policy.source is None and not isinstance(ref, (RegistryRef, ArchiveRef))):
            return Verdict(name, digest)
        return _judged(name, digest, mode, f"no rule of {where} covers it", where)
    if digest is None or not isinstance(ref, (LayoutRef, RegistryRef)):
        return _judged(name, digest, mode, "directories and archives carry no signature", where)
    # imported here, because a node without rules needs no cryptography
    from cryoci.ociimage.trust import verify

    try:
        found = verify.require(
            store or stores.open_store(ref, registry_options), digest, rule.keys, keyless_of(rule)
        )
    except TrustError as e:
        return _judged(name, digest, mode, e.message, where)
    if rule.provenance and not found.provenance:
        return _judged(name, digest, mode, f"no provenance signed by {_names(rule)}", where)
    return Verdict(name, digest, tuple(sorted({v.key for v in found.signatures})))


def rule_of(ref: Reference) -> Rule:
    """The node's rule for `ref`. Raises UsageError when it names no signer."""
    rule = load().rule(name_of(ref))
    if rule is None or not (rule.keys or rule.identities):
        raise UsageError(f"no rule of {PATH} names a signer for {ref}", hint="give --key FILE")
    return rule


def keyless_of(rule: Rule) -> Keyless | None:
    """The identities that a rule asks for. Raises ConfigError when its roots cannot be read."""
    if not rule.identities:
        return None
    from cryoci.ociimage.trust import identity, roots

    known = tuple(identity.Identity(*one) for one in rule.identities)
    return identity.Keyless(known, roots.load(rule.roots))


def name_of(ref: Reference) -> str:
    """What rules are matched with; paths are resolved, so that no link or `..` leads around a rule."""
    if isinstance(ref, RegistryRef):
        return f"{ref.host}/{ref.repository}"
    if isinstance(ref, LayoutRef):
        return f"oci:{ref.path.resolve()}:{ref.name or ''}"
    assert isinstance(ref, (DirectoryRef, ArchiveRef))
    return str(ref.path.resolve())


def _judged(name: str, digest: str | None, mode: str, why: str, where: Path) -> Verdict:
    what = f"{name}@{digest}" if digest else name
    if mode == "strict":
        raise TrustError(
            f"{what} is refused: {why}",
            hint=f"have its maker sign it (cryoci sign), or change {where}; nothing of it was used",
        )
    return Verdict(name, digest, (), f"nobody vouches for {what}: {why}")


def _names(rule: Rule) -> str:
    return " or ".join([*(path.name for path in rule.keys), *(subject for subject, _ in rule.identities)])


def _rule(value: Any, number: int, path: Path) -> Rule:
    where = f"{path}: rule {number}"
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a table")
    _known(value, ("match", "keys", "identities", "roots", "accept", "provenance", "mode"), where)
    match = value.get("match")
    keys, roots = (_paths(value.get(name, []), f"{where}: {name}", path) for name in ("keys", "roots"))
    identities = _identities(value.get("identities", []), where)
    if not isinstance(match, str) or not match:
        raise ConfigError(f"{where} has no match", hint='match = "HOST/REPOSITORY", * for any')
    if bool(identities) != bool(roots):
        raise ConfigError(
            f"{where} needs both identities and roots",
            hint='roots = ["trusted_root.json"]: who vouches for them',
        )
    flags = {name: value.get(name, False) for name in ("accept", "provenance")}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ConfigError(f"{where}: accept and provenance are true or false")
    if bool(keys or identities) == flags["accept"]:
        raise ConfigError(f"{where} needs either keys or identities, or accept = true")
    mode = value.get("mode")
    return Rule(
        match,
        keys,
        identities,
        roots,
        mode=None if mode is None else _mode(mode, where),
        **flags,
    )


def _paths(value: object, where: str, path: Path) -> tuple[Path, ...]:
    if not isinstance(value, list) or not all(isinstance(k, str) and k for k in value):
        raise ConfigError(f"{where} is not a list of file names")
    return tuple(path.parent / name for name in value)


def _identities(value: object, where: str) -> tuple[tuple[str, str], ...]:
    found = []
    for one in value if isinstance(value, list) else [None]:
        if not isinstance(one, dict):
            raise ConfigError(f"{where}: identities is not a list of tables", hint=_IDENTITY)
        _known(one, ("subject", "issuer"), f"{where}: identities")
        subject, issuer = one.get("subject"), one.get("issuer")
        if (
            not isinstance(subject, str)
            or not isinstance(issuer, str)
            or not subject.strip("*")
            or not issuer
        ):
            raise ConfigError(
                f"{where}: an identity needs a subject (other than *) and an issuer", hint=_IDENTITY
            )
        found.append((subject, issuer))
    return tuple(found)


_IDENTITY = 'identities = [{ subject = "https://...", issuer = "https://..." }]'


def _mode(value: object, where: str) -> str:
    if value not in MODES:
        raise ConfigError(f"{where}: mode {value!r} is none of {', '.join(MODES)}")
    return str(value)


def _known(value: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(value) - set(names)):
        # a misspelt rule that is skipped in silence would be a hole
        raise ConfigError(f"{where}: unknown {', '.join(unknown)}", hint=f"known: {', '.join(names)}")
