# SPDX-License-Identifier: Apache-2.0
"""Who we are to a registry: auth files and credential helpers, in the order of containers-auth.json(5).

The token protocol itself (distribution "token authentication specification") is oras-py's TokenAuth; what it
lacks is added here: the containers auth files, per-repository entries, identity tokens, Basic challenges.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryoci.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    import requests

MAX_FILE = 4 << 20  # bytes of an auth file
_TOKEN_USER = "<token>"  # docker-credential-helpers: what follows is an identity token, no password
_DOCKER_HUB = "https://index.docker.io/v1/"


@dataclass(frozen=True)
class Credentials:
    """What an auth file says for a registry; secrets stay out of `repr`."""

    basic: str = field(default="", repr=False)  # base64 of user:password
    identity_token: str = field(default="", repr=False)
    source: str = "none"


def auth_files(explicit: Path | None) -> list[Path]:
    """Auth files in order of precedence; one that was named explicitly is the only one."""
    if explicit is not None:
        return [explicit]
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        return [Path(named)]
    home = Path(os.environ.get("HOME") or "/root")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    found = [Path(runtime) / "containers/auth.json"] if runtime else []
    found.append(Path(f"/run/containers/{os.getuid()}/auth.json"))
    found.append(config / "containers/auth.json")
    found.append(Path(os.environ.get("DOCKER_CONFIG") or home / ".docker") / "config.json")
    return found


def find(host: str, repository: str, explicit: Path | None = None) -> Credentials:
    """The first credentials for host/repository, the longest matching path first; empty when there are none.

    Raises ConfigError for an auth file that is broken, or was named and is missing.
    """
    keys = _keys(host, repository)
    for path in auth_files(explicit):
        value = _load(path, required=explicit is not None or "REGISTRY_AUTH_FILE" in os.environ)
        auths = value.get("auths") if isinstance(value.get("auths"), dict) else {}
        for key in keys:
            entry = auths.get(key) if isinstance(auths, dict) else None
            if isinstance(entry, dict) and (entry.get("auth") or entry.get("identitytoken")):
                return _entry(entry, f"{path} ({key})")
            if basic := _helper(value, key):
                return basic
    return Credentials()


def _keys(host: str, repository: str) -> list[str]:
    parts = repository.split("/")
    keys = ["/".join([host, *parts[:n]]) for n in range(len(parts), -1, -1)]
    keys.append(f"https://{host}")
    return [*keys, _DOCKER_HUB] if host in ("docker.io", "registry-1.docker.io") else keys


def _load(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE:
            raise ConfigError(f"the auth file {path} is over {MAX_FILE} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if required:
            raise ConfigError(
                f"no auth file at {path}", hint="podman login --authfile FILE REGISTRY"
            ) from None
        return {}
    except (OSError, ValueError) as e:
        if isinstance(e, PermissionError) and not required:
            return {}  # another user's
        raise ConfigError(
            f"cannot read the auth file {path}: {e}", hint="repair or remove it, then log in"
        ) from e
    if not isinstance(value, dict):
        raise ConfigError(f"the auth file {path} is not a JSON object")
    return value


def _entry(entry: dict[str, Any], source: str) -> Credentials:
    basic, token = str(entry.get("auth") or ""), str(entry.get("identitytoken") or "")
    if basic:
        try:
            known = b":" in base64.b64decode(basic, validate=True)
        except (binascii.Error, ValueError):
            known = False
        if not known:
            raise ConfigError(
                f"the credentials in {source} are not base64 of user:password", hint="log in again"
            )
    return Credentials(basic, token, source)


def _helper(value: dict[str, Any], key: str) -> Credentials | None:
    helpers = value.get("credHelpers")
    name = helpers.get(key) if isinstance(helpers, dict) else None
    name = name or (value.get("credsStore") if "/" not in key.removeprefix("https://") else None)
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        return None
    from oras.auth.token import TokenAuth

    source = f"docker-credential-{name}"
    try:
        basic = TokenAuth()._get_auth_from_creds_store(name, key)
        user, _, secret = base64.b64decode(basic or "").decode().partition(":")
    except (KeyError, ValueError) as e:
        raise ConfigError(f"{source} gave no credentials for {key}: {e}") from e
    if user == _TOKEN_USER:
        return Credentials("", secret, source)
    return Credentials(basic, "", source) if basic else None


class Authenticator:
    """Answers a registry's challenges; `header` is what requests to it carry.

    `check` is given each answer of a token service, to raise what is worth another try.
    """

    def __init__(
        self,
        session: requests.Session,
        scheme: str,
        verify: bool | str,
        credentials: Credentials,
        check: Callable[[requests.Response], None],
    ) -> None:
        self.credentials = credentials
        self.header: str | None = None
        self._session = session
        self._scheme = scheme
        self._verify = verify
        self._check = check
        self._actions: dict[str, set[str]] = {}  # that were wanted so far, by resource

    def answer(self, response: requests.Response) -> bool:
        """Take up the challenge of a 401; False when we have nothing (more) to offer."""
        challenge = response.headers.get("WWW-Authenticate", "")
        kind = challenge.partition(" ")[0].lower()
        if kind == "basic" and self.credentials.basic:
            new = f"Basic {self.credentials.basic}"
        elif kind == "bearer":
            token = self._token(challenge)
            if not token:
                return False
            new = f"Bearer {token}"
        else:
            return False
        changed = new != self.header
        self.header = new
        return changed

    def _token(self, challenge: str) -> str | None:
        # imported here, because most registries inside a cluster never ask
        from oras.auth.token import TokenAuth
        from oras.auth.utils import parse_auth_header

        wanted = parse_auth_header(challenge)
        wanted.scope = self._wider(wanted.scope or "")
        realm = wanted.realm or ""
        has_secret = bool(self.credentials.basic or self.credentials.identity_token)
        if self._scheme == "https" and has_secret and realm.startswith("http://"):
            raise RegistryError(
                f"the registry asks to send credentials to {realm} without encryption",
                hint="use another registry",
            )
        if self.credentials.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": self.credentials.identity_token}
            form |= {"service": wanted.service or "", "scope": wanted.scope or "", "client_id": "cryoci"}
            answer = self._session.post(realm, data=form)
            self._check(answer)
            value = answer.json() if answer.status_code == 200 else {}
            token = value.get("access_token") or value.get("token")
        else:
            service = TokenAuth()
            service.session, service.prefix, service._tls_verify = self, self._scheme, self._verify
            if self.credentials.basic:
                service._basic_auth = self.credentials.basic
            token = service.request_token(wanted)
        return token if isinstance(token, str) and token else None

    def get(self, url: str, **more: Any) -> requests.Response:
        """The request of TokenAuth, which takes any failure for a refusal."""
        answer = self._session.get(url, **more)
        self._check(answer)
        return answer

    def _wider(self, scope: str) -> str:
        """`scope` with what was wanted of the same resources before.

        Registries ask for no more than the one request needs, and requests of another kind run beside it: each would
        replace the other's token.
        """
        known = []
        for part in scope.split():
            resource, _, actions = part.rpartition(":")
            wanted = self._actions.setdefault(resource, set())
            wanted.update(actions.split(","))
            known.append(f"{resource}:{','.join(sorted(wanted))}")
        return " ".join(known)
