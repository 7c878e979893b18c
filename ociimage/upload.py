# SPDX-License-Identifier: Apache-2.0
"""One blob on its way up to a registry (distribution-spec v1.1 "Pushing a blob in chunks" and its monolithic form)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import requests

from cryoci.errors import ImageError, NotFoundError, RegistryError
from cryoci.ociimage import blob, transport
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.transport import LostError

PIECE = 256 << 10  # bytes of one HTTP chunk
OCTETS = {"Content-Type": "application/octet-stream"}
_NO_PATCH = (404, 405, 411, 415, 501)  # answers of registries that take no streamed PATCH


class RefusedError(Exception):
    """The registry takes no streamed PATCH."""


class Upload:
    """One blob on its way up, over however many connections it takes."""

    def __init__(
        self,
        http: transport.Transport,
        path: str,
        source: blob.Source,
        expected: Descriptor | None,
        advance: Callable[[int], None],
    ) -> None:
        self._http = http
        self._path = path
        self._source = source
        self._expected = expected
        self._advance = advance
        self._hash = hashlib.sha256()
        self._size = 0  # bytes that the source has given in this round
        self._shown = 0  # bytes that progress knows of
        self._what = f"upload blob {expected.digest}" if expected else "upload a layer"

    def stream(self, chunks: Iterator[bytes]) -> blob.Stored:
        """POST, PATCH (again from where it broke, if need be), PUT."""
        url, offset, sent = self._begin(), 0, 0
        for attempt in range(self._http.options.attempts):
            try:
                answer = self._http.request(
                    "PATCH",
                    url,
                    ok=(202, 204, *_NO_PATCH),
                    what=self._what,
                    data=self._counted(chunks, offset),
                    headers=OCTETS,
                )
                if answer.status_code in _NO_PATCH:
                    if attempt == 0 or answer.status_code != 404:
                        self._cancel(url)
                        raise RefusedError
                    url, offset = self._begin(), 0
                    chunks = self._again()
                    continue
                sent += self._size - offset
                return self._commit(self._http.trusted(location(answer)), sent)
            except LostError as e:
                if attempt == self._http.options.attempts - 1:
                    self._cancel(url)
                    raise
                transport.sleep(e.pause if e.pause is not None else 0.5 * 2**attempt)
                sent += max(0, self._size - offset)
                url, offset = self._resume(url)
                chunks = self._again()
            except BaseException:
                self._cancel(url)
                raise
        raise AssertionError

    def monolithic(self) -> blob.Stored:
        """POST and one PUT with its length; the source is read once more first, for digest and length."""
        for chunk in self._again():
            self._hash.update(chunk)
            self._size += len(chunk)
        digest, size = f"sha256:{self._hash.hexdigest()}", self._size
        if self._expected is not None:
            blob.check(digest, size, self._expected)
        for attempt in range(self._http.options.attempts):
            url = self._begin()
            try:
                self._http.request(
                    "PUT",
                    url,
                    params={"digest": digest},
                    ok=(201, 204),
                    what=self._what,
                    data=_Sized(self._counted(self._again(), 0), size),
                    headers=OCTETS,
                )
                return blob.Stored(digest, size, size)
            except LostError as e:
                if attempt == self._http.options.attempts - 1:
                    raise
                transport.sleep(e.pause if e.pause is not None else 0.5 * 2**attempt)
        raise AssertionError

    def _begin(self) -> str:
        answer = self._http.request("POST", f"{self._path}/blobs/uploads/", ok=(202,), what=self._what)
        return self._http.trusted(location(answer))

    def _again(self) -> Iterator[bytes]:
        self._hash, self._size = hashlib.sha256(), 0
        return self._source.open()

    def _counted(self, chunks: Iterator[bytes], skip: int) -> Iterator[memoryview]:
        """`chunks` from byte `skip` on; all of them are hashed."""
        while (chunk := self._read(chunks)) is not None:
            self._hash.update(chunk)
            start = max(0, min(len(chunk), skip - self._size))
            self._size += len(chunk)
            if self._size > self._shown:
                self._advance(self._size - self._shown)
                self._shown = self._size
            view = memoryview(chunk)[start:]
            for i in range(0, len(view), PIECE):  # urllib3 copies each piece: small ones stay in the cache
                yield view[i : i + PIECE]

    def _read(self, chunks: Iterator[bytes]) -> bytes | None:
        try:
            return next(chunks, None)
        except OSError as e:  # else it would pass for a fault of the network, and be tried again
            raise ImageError(f"{self._what}: cannot read it: {e}") from e

    def _resume(self, url: str) -> tuple[str, int]:
        """Where the upload stands, or a new upload when the registry has forgotten it."""
        try:
            answer = self._http.request("GET", url, ok=(204, 202), what=self._what)
            last = answer.headers.get("Range", "").rpartition("-")[2]
            return self._http.trusted(location(answer)), int(
                last
            ) + 1 if last.isdigit() and last != "0" else 0
        except (RegistryError, NotFoundError) as e:
            if isinstance(e, LostError):
                raise
            return self._begin(), 0

    def _commit(self, url: str, sent: int) -> blob.Stored:
        digest = f"sha256:{self._hash.hexdigest()}"
        if self._expected is not None:
            blob.check(digest, self._size, self._expected)
        self._http.request(
            "PUT", url, params={"digest": digest}, ok=(201, 204), what=self._what, headers=OCTETS
        )
        return blob.Stored(digest, self._size, sent)

    def _cancel(self, url: str) -> None:
        cancel(self._http, url)


def cancel(http: transport.Transport, url: str) -> None:
    try:
        http.request("DELETE", url, ok=(200, 202, 204, 404, 405), what="cancel an upload", attempts=1)
    except (RegistryError, NotFoundError):
        pass  # the registry purges stale uploads by itself; the first error is the one to tell


class _Sized:
    """An iterator with a length, which makes requests send Content-Length instead of chunks."""

    def __init__(self, chunks: Iterator[memoryview], size: int) -> None:
        self._chunks = chunks
        self._size = size

    def __iter__(self) -> Iterator[memoryview]:
        return self._chunks

    def __next__(self) -> memoryview:
        return next(self._chunks)

    def __len__(self) -> int:
        return self._size


def location(answer: requests.Response) -> str:
    location = answer.headers.get("Location")
    if not location:
        raise RegistryError(f"{urlsplit(answer.url or '').netloc} gave no Location for an upload")
    return requests.compat.urljoin(answer.url or "", location)
