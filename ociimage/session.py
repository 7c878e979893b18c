# SPDX-License-Identifier: Apache-2.0
"""The HTTP client below `Transport`: requests, with what a registry needs of it. Imported when one is asked."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

from cryoci.errors import ConfigError, RegistryError


class Session(requests.Session):
    """Timeouts on everything, no .netrc, no redirect from https to http."""

    timeouts: tuple[float, float] = (10.0, 120.0)

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        if kwargs.get("timeout") is None:
            kwargs["timeout"] = self.timeouts
        return super().send(request, **kwargs)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        plain = target is not None and urljoin(resp.url, target).startswith("http:")
        if plain and resp.url.startswith("https:"):
            raise RegistryError(f"{urlsplit(resp.url).netloc} redirects to unencrypted {str(target)[:200]}")
        return target


class Adapter(requests.adapters.HTTPAdapter):
    """Connections that trust the authorities of certs.d beside those of the system."""

    def __init__(self, authorities: tuple[Path, ...]) -> None:
        self._context: ssl.SSLContext | None = None
        if authorities:
            self._context = ssl.create_default_context()
            for path in authorities:
                try:
                    self._context.load_verify_locations(path)
                except OSError as e:
                    raise ConfigError(f"{path} is no certificate in PEM: {e}", hint="repair it") from e
        super().__init__(pool_maxsize=16)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        if self._context is not None:
            kwargs["ssl_context"] = self._context
        super().init_poolmanager(*args, **kwargs)


def no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """No credentials of requests' own finding."""
    return request
