# SPDX-License-Identifier: Apache-2.0
"""HTTP to one registry: scheme, authentication, timeouts, bounded retries, and errors that say why.

Retried: 429, 500, 502, 503, 504 and lost connections, with Retry-After or a growing, jittered pause. Never
retried: every other 4xx, because asking again does not make it true.
"""

from __future__ import annotations

import ipaddress
import random
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urljoin, urlsplit

from cryoci.errors import CryociError, NotFoundError, RegistryError
from cryoci.ociimage import credentials, registries, strictjson

if TYPE_CHECKING:  # imported when a registry is asked: restores out of a store need no HTTP
    import requests

    from cryoci.ociimage.session import Session

RETRIED = frozenset({429, 500, 502, 503, 504})
MAX_PAUSE = 30.0  # seconds, also for a Retry-After
# where a registry is served that has another name in references and auth files
SERVED = {"docker.io": "registry-1.docker.io"}
_OURS = ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "UNKNOWN_CA")  # TLS alerts: our certificate is meant
_TLS_AS_PLAIN = "Client sent an HTTP request to an HTTPS server"
sleep = time.sleep  # tests replace it


@dataclass(frozen=True)
class RegistryOptions:
    """How to reach registries. `plain_http` None: plain for loopback, else what registries.conf says."""

    plain_http: bool | None = None
    tls_verify: bool = True
    ca_file: Path | None = None
    auth_file: Path | None = None
    connect_timeout: float = 10.0  # seconds
    read_timeout: float = 120.0  # seconds without a byte
    attempts: int = 5
    insecure: bool = False  # plain HTTP and any certificate will do (a mirror that is marked so)


class LostError(RegistryError):
    """A request that may be tried again failed; `status` is None when the connection was lost."""

    def __init__(self, message: str, status: int | None, pause: float | None) -> None:
        lost = "see that a registry listens there and can be reached from here, then try again"
        super().__init__(message, hint="try again later" if status else lost)
        self.status = status
        self.pause = pause


class Transport:
    """Requests to the registry at `host` on behalf of one repository. May be used from several threads."""

    def __init__(self, host: str, repository: str, options: RegistryOptions) -> None:
        self.host = host
        self._served = SERVED.get(host, host)
        self.options = options
        self._loopback = is_loopback(host)
        self._insecure = options.insecure or self._loopback or is_insecure(host, repository)
        self._verify: bool | str = str(options.ca_file) if options.ca_file else options.tls_verify
        if self._insecure and not options.ca_file:
            self._verify = False
        self._session = self._new_session()
        self._credentials = credentials.find(host, repository, options.auth_file)
        self.base = ""
        self._connecting = threading.Lock()
        self._auth: credentials.Authenticator | None = None
        self._login = threading.Lock()

    def _new_session(self) -> Session:
        import urllib3

        from cryoci.ociimage.session import Adapter, Session, no_auth

        session = Session()
        session.timeouts = (self.options.connect_timeout, self.options.read_timeout)
        session.auth = no_auth  # else requests looks into ~/.netrc
        session.verify = self._verify
        if self._verify is False:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # it was asked for
        session.headers["User-Agent"] = "cryoci"
        session.headers["Accept-Encoding"] = (
            "identity"  # blobs are compressed, and their digest is of the bytes
        )
        if self._loopback:
            session.trust_env = False  # a proxy cannot reach our loopback
        known = registries.certificates(self.host)
        session.mount("http://", Adapter(None))
        # with --ca-file or without verification it is the session that says whom to trust
        own = known.authorities if self._verify is True else None
        session.mount(f"https://{self._served}/", Adapter(own, known.client))
        session.mount("https://", Adapter(() if self._verify is True else None))
        return session

    def connect(self) -> None:
        """Find the scheme and see that a registry answers. Raises RegistryError saying what is wrong."""
        with self._connecting:  # parallel transfers must not see a scheme that is still being tried
            if not self.base:
                self._choose_scheme()

    def _choose_scheme(self) -> None:
        schemes = ["https"]
        if self.options.plain_http:
            schemes = ["http"]
        elif self.options.plain_http is None and self._insecure:
            schemes = ["http", "https"] if self._loopback else ["https", "http"]
        for scheme in schemes:
            self.base = f"{scheme}://{self._served}"
            self._auth = credentials.Authenticator(
                self._session, scheme, self._verify, self._credentials, self._check_token
            )
            try:
                answer = self._ping()
            except RegistryError:
                if scheme != schemes[-1]:
                    continue
                self.base = ""
                raise
            if scheme == "http" and answer.status_code == 400 and _TLS_AS_PLAIN in answer.text:
                if scheme != schemes[-1]:
                    continue
                self.base = ""
                raise RegistryError(f"{self.host} speaks TLS, not plain HTTP", hint="leave out --plain-http")
            return

    def _ping(self) -> requests.Response:
        # a login may be asked for here already; that is answered when the first real request is made
        for attempt in (1, 2):
            try:
                return self._once("GET", f"{self.base}/v2/", {}, None, False)
            except LostError as e:
                if attempt == 2:
                    raise
                wait(attempt, e)
        raise AssertionError

    def request(
        self,
        method: str,
        url: str,
        *,
        ok: Collection[int],
        what: str,
        headers: Mapping[str, str] | None = None,
        data: bytes | Iterator[memoryview] | None = None,
        stream: bool = False,
        params: Mapping[str, str] | None = None,
        attempts: int | None = None,
    ) -> requests.Response:
        """One request, authenticated, retried when its body allows it; `what` says in words what it is for.

        `url` may be relative to the registry. A body that is an iterator is sent once. Raises LostError when
        the last try failed in a way that could be tried again, RegistryError or NotFoundError otherwise.
        """
        with self._login:
            self.connect()
        url = urljoin(self.base + "/", url)
        if params:
            url += ("&" if "?" in url else "?") + urlencode(params)
        replayable = data is None or isinstance(data, bytes)
        left = attempts or (self.options.attempts if replayable else 1)
        challenges = 0
        tries = 0
        while True:
            left -= 1
            tries += 1
            try:
                used = self._auth.header if self._auth else None
                answer = self._once(method, url, headers or {}, data, stream)
                if answer.status_code in ok:
                    return answer
                # twice: the first time it may be another request's token that is tried
                if answer.status_code == 401 and challenges < 2 and self._answer(answer, used):
                    challenges += 1
                    if replayable:
                        left += 1
                        answer.close()
                        continue
                    raise LostError(f"{self.host} wanted a new login in the middle of {what}", 401, 0.0)
                raise self._failure(answer, what)
            except LostError as e:
                if left <= 0:
                    raise
                wait(tries, e)

    def trusted(self, location: str) -> str:
        """An absolute upload location; refuses one that leaves encryption behind."""
        url = urljoin(self.base + "/", location)
        if self.base.startswith("https:") and not url.startswith("https:"):
            raise RegistryError(
                f"{self.host} wants the upload sent unencrypted to {urlsplit(url).netloc}",
                hint="its reverse proxy must pass X-Forwarded-Proto",
            )
        return url

    def _answer(self, response: requests.Response, used: str | None) -> bool:
        import requests

        assert self._auth is not None
        try:
            with self._login:
                # another thread may have been through this while our request was on its way
                return self._auth.header != used or self._auth.answer(response)
        except requests.exceptions.SSLError as e:
            raise self._tls_failure(e) from e
        except (requests.ConnectionError, requests.Timeout) as e:
            message = f"the token service of {self.host} did not answer: {_reason(e)}"
            raise LostError(message, None, None) from e
        except (requests.RequestException, ValueError) as e:
            raise RegistryError(f"the token service of {self.host} gave no token: {e}") from e

    def _check_token(self, answer: requests.Response) -> None:
        """Raise LostError for what a token service may answer otherwise the next time."""
        if answer.status_code in RETRIED:
            message = f"the token service of {self.host} answered {answer.status_code}"
            raise LostError(message, answer.status_code, _retry_after(answer))

    def _once(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        data: bytes | Iterator[memoryview] | None,
        stream: bool,
    ) -> requests.Response:
        import requests
        import urllib3

        sent = dict(headers)
        if self._auth is not None and self._auth.header and _origin(url) == _origin(self.base):
            sent["Authorization"] = self._auth.header
        try:
            return self._session.request(
                method,
                url,
                headers=sent,
                data=data,  # type: ignore[arg-type]  # requests sends any iterable of buffers
                stream=stream,
                allow_redirects=method in ("GET", "HEAD"),
            )
        except requests.exceptions.SSLError as e:
            raise self._tls_failure(e) from e
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as e:
            raise RegistryError(f"{self.host} sent a bad address: {e}") from e
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
            raise LostError(f"cannot reach registry {self.host}: {_reason(e)}", None, None) from e

    def _tls_failure(self, e: Exception) -> RegistryError:
        text = _reason(e)
        if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
            return RegistryError(
                f"{self.host} speaks plain HTTP, not TLS",
                hint="if that is meant so: --plain-http, or insecure = true in registries.conf",
            )
        if any(f"ALERT_{said}" in text for said in _OURS):
            return RegistryError(
                f"{self.host} wants to see a certificate of ours that it knows ({text})",
                hint=f"put NAME.cert and NAME.key into /etc/containers/certs.d/{self.host}/",
            )
        return RegistryError(
            f"no trusted TLS connection to {self.host}: {text}",
            hint="give its CA with --ca-file, or install it on this host",
        )

    def _failure(self, answer: requests.Response, what: str) -> CryociError:
        status = answer.status_code
        said = _said(answer)
        message = f"{what}: {self.host} answered {status}{f' ({said})' if said else ''}"
        if status in RETRIED:
            return LostError(message, status, _retry_after(answer))
        if status == 401:
            source = self._credentials.source
            known = "no credentials were found" if source == "none" else f"those of {source} were refused"
            return RegistryError(
                f"{what}: {self.host} wants a login, and {known}", hint=f"podman login {self.host}"
            )
        if status == 403:
            return RegistryError(message, hint="this login may not do that in this repository")
        if status == 404:
            return NotFoundError(
                message, hint="check the repository and tag, and that the login may see them"
            )
        if status == 413:
            return RegistryError(
                message, hint="raise the body size limit of the registry, or of the proxy before it"
            )
        if status == 405:
            return RegistryError(
                message, hint="the registry does not allow this (deletion is off by default)"
            )
        return RegistryError(message)


def wait(tries: int, lost: LostError | None = None) -> None:
    """The pause after `tries` tries: what the registry asked for, else one that grows; MAX_PAUSE seconds at most.

    It is jittered, so that the nodes whose registry came back do not all ask at once.
    """
    if lost is not None and lost.pause is not None:
        sleep(min(MAX_PAUSE, lost.pause))
    else:
        sleep(min(MAX_PAUSE, 0.5 * 2 ** (tries - 1) * random.uniform(0.5, 1.5)))


def is_loopback(host: str) -> bool:
    """Whether a registry host (with or without port) is this machine."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def is_insecure(host: str, repository: str, conf: Path | None = None) -> bool:
    """Whether containers-registries.conf(5) marks the registry insecure; the longest prefix decides."""
    return registries.find(host, repository, conf).insecure


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _reason(e: BaseException) -> str:
    """The innermost cause, which is the one that a person understands."""
    inner: Any = e
    for _ in range(8):
        following = getattr(inner, "reason", None) or (
            inner.args[0] if getattr(inner, "args", None) else None
        )
        if not isinstance(following, BaseException):
            break
        inner = following
    return str(inner).rpartition("object at 0x")[2].partition(">: ")[2] or str(inner) or type(inner).__name__


def _said(answer: requests.Response) -> str:
    try:
        raw = answer.raw.read(4096) if not answer._content_consumed else answer.content[:4096]  # type: ignore[attr-defined]
        value = strictjson.load_object(raw, "error", limit=4096)
        first = value["errors"][0]
        words = f"{first.get('code', '')}: {first.get('message', '')}".strip(": ")
    except Exception:
        return ""
    return "".join(c for c in words if c.isprintable())[:300]


def _retry_after(answer: requests.Response) -> float | None:
    text = answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
