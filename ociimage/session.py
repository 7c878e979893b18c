# SPDX-License-Identifier: Apache-2.0
"""The HTTP client below `Transport`: requests, with what a registry needs of it. Imported when one is asked."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

from cryoci.errors import ConfigError, RegistryError

_POOL = 16  # connections that are kept


class Session(requests.Session):
    """Timeouts on everything, no .netrc, no redirect from https to http."""

    timeouts: tuple[float, float] = (10.0, 120.0)

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = self.timeouts
        return super().send(request, **kwargs)

    def merge_environment_settings(self, url: Any, proxies: Any, stream: Any, verify: Any, cert: Any) -> Any:
        """As requests', which takes $REQUESTS_CA_BUNDLE and $CURL_CA_BUNDLE for more than what was said here."""
        if verify is None and self.verify is not True:
            verify = self.verify
        return super().merge_environment_settings(url, proxies, stream, verify, cert)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        plain = target is not None and urljoin(resp.url, target).startswith("http:")
        if plain and resp.url.startswith("https:"):
            raise RegistryError(f"{urlsplit(resp.url).netloc} redirects to unencrypted {str(target)[:200]}")
        return target


class Adapter(requests.adapters.HTTPAdapter):
    """Connections that trust the authorities of this system and those of certs.d; requests itself knows neither.

    With None they trust whom the session says, and nobody else. `client` is a certificate and its key, which are
    shown on these connections alone: a session's would be shown wherever a registry redirects to.
    """

    def __init__(
        self, authorities: tuple[Path, ...] | None, client: tuple[Path, Path] | None = None
    ) -> None:
        self._authorities = authorities
        self._client = (str(client[0]), str(client[1])) if client else None
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        super().__init__(pool_maxsize=_POOL)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if self._authorities is not None and str(request.url).startswith("https:"):
            with self._lock:
                if self._context is None:  # plain HTTP needs none, and reading them all takes its time
                    self._context = _trusting(self._authorities)
                    self.init_poolmanager(_POOL, _POOL)
        if self._client is not None:
            kwargs["cert"] = self._client
        return super().send(request, *args, **kwargs)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        if self._context is not None:
            kwargs["ssl_context"] = self._context
        super().init_poolmanager(*args, **kwargs)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        if self._context is not None:
            kwargs["ssl_context"] = self._context
        return super().proxy_manager_for(proxy, **kwargs)


def _trusting(authorities: tuple[Path, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for path in authorities:
        try:
            context.load_verify_locations(path)
        except OSError as e:
            raise ConfigError(f"{path} is no certificate in PEM: {e}", hint="repair it") from e
    return context


def no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """No credentials of requests' own finding."""
    return request
