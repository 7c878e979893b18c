# SPDX-License-Identifier: Apache-2.0
"""One blob on its way up to a registry (distribution-spec v1.1 "Pushing a blob in chunks" and its monolithic form)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from cryoci.errors import ImageError, NotFoundError, RegistryError
from cryoci.ociimage import blob, transport
from cryoci.ociimage.journal import Journal
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.transport import LostError

if TYPE_CHECKING:
    import requests

PIECE = 256 << 10  # bytes of one HTTP chunk
OCTETS = {"Content-Type": "application/octet-stream"}
_NO_PATCH = (404, 405, 411, 415, 501)  # answers of registries that take no streamed PATCH


class RefusedError(Exception):
    """The registry takes no streamed PATCH."""


class Upload:
    """One blob on its way up, over however many connections it takes.

    With `journal` a push that did not end is taken up where its registry says that it stands.
    """

    def __init__(
        self,
        http: transport.Transport,
        path: str,
        source: blob.Source,
        expected: Descriptor | None,
        advance: Callable[[int], None],
        journal: Journal | None = None,
    ) -> None:
        self._http = http
        self._path = path
        self._source = source
        self._expected = expected
        self._promised = expected.size if expected else source.size
        self._advance = advance
        self._name = expected.digest if expected else source.name
        self._journal = journal if self._name else None
        self._hash = blob.Digest()
        self._size = 0  # bytes that the source has given in this round
        self._shown = 0  # bytes that progress knows of
        self._what = f"upload blob {expected.digest}" if expected else "upload a layer"

    def stream(self, chunks: Iterator[bytes]) -> blob.Stored:
        """POST, PATCH (again from where it broke, if need be), PUT."""
        url, offset = self._take_up()
        foreign = offset  # bytes of a push before this one, which may have been of other content
        sent, tries = 0, 0
        while True:
            tries += 1
            try:
                answer = self._http.request(
                    "PATCH",
                    url,
                    ok=(202, 204, *_NO_PATCH),
                    what=self._what,
                    data=self._body(chunks, offset),
                    headers=self._range(offset),
                )
                if answer.status_code in _NO_PATCH:
                    if (tries == 1 and not foreign) or answer.status_code != 404:
                        raise RefusedError
                    raise LostError(f"{self._what}: the registry has forgotten it", 404, 0.0)
                sent += self._size - offset
                return self._commit(self._http.trusted(location(answer)), sent)
            except LostError as e:
                if tries >= self._http.options.attempts:
                    if self._journal is None:
                        self._cancel(url)
                    raise
                transport.wait(tries, e)
                sent += max(0, self._size - offset)
                url, offset = self._resume(url)
            except (RegistryError, NotFoundError):
                self._cancel(url)
                if not foreign:
                    raise
                foreign = 0
                url, offset = self._begin(), 0
            except BaseException as e:
                if self._journal is None or isinstance(e, (ImageError, RefusedError)):
                    self._cancel(url)
                raise
            chunks = self._again()

    def monolithic(self) -> blob.Stored:
        """POST and one PUT with its length; the source is read once more first, for digest and length."""
        for chunk in self._again():
            self._hash.update(chunk)
            self._size += len(chunk)
        digest, size = self._hash.result(), self._size
        if self._expected is not None:
            blob.check(digest, size, self._expected)
        for attempt in range(self._http.options.attempts):
            url = self._begin()
            try:
                body = _Sized(self._counted(self._again(), 0, blob.CHUNK), size)
                commit(self._http, self._path, url, digest, self._what, body)
                return self._ended(blob.Stored(digest, size, size))
            except LostError as e:
                if attempt == self._http.options.attempts - 1:
                    raise
                transport.wait(attempt + 1, e)
        raise AssertionError

    def _begin(self) -> str:
        answer = self._http.request("POST", f"{self._path}/blobs/uploads/", ok=(202,), what=self._what)
        url = self._http.trusted(location(answer))
        if self._journal is not None:
            self._journal.begun(self._name, url)
        return url

    def _take_up(self) -> tuple[str, int]:
        """The upload of a push that did not end, and how much of it there is; else a new one."""
        known = self._journal.upload(self._name) if self._journal is not None else None
        return (self._begin(), 0) if known is None else self._resume(self._http.trusted(known))

    def _again(self) -> Iterator[bytes]:
        self._hash, self._size = blob.Digest(), 0
        return self._source.open()

    def _body(self, chunks: Iterator[bytes], skip: int) -> Iterator[memoryview]:
        """What is sent from byte `skip` on: with its length where that is known, which spares a copy."""
        if self._promised is None:
            return self._counted(chunks, skip, PIECE)
        left = max(0, self._promised - skip)
        return _Sized(self._counted(chunks, skip, blob.CHUNK, left), left)

    def _counted(
        self, chunks: Iterator[bytes], skip: int, piece: int, most: int = sys.maxsize
    ) -> Iterator[memoryview]:
        """`chunks` from byte `skip` on, at most `most` bytes of it; all of them are hashed."""
        while (chunk := self._read(chunks)) is not None:
            self._hash.update(chunk)
            start = max(0, min(len(chunk), skip - self._size))
            self._size += len(chunk)
            if self._size > self._shown:
                self._advance(self._size - self._shown)
                self._shown = self._size
            view = memoryview(chunk)[start:][:most]
            most -= len(view)
            for i in range(0, len(view), piece):  # urllib3 copies chunks: small ones stay in the cache
                yield view[i : i + piece]
        if self._expected is not None and self._size < self._expected.size:
            blob.check(self._hash.result(), self._size, self._expected)

    def _range(self, offset: int) -> dict[str, str]:
        """The headers of a PATCH. distribution-spec wants the range, which is known when the size is."""
        if self._promised is None or offset >= self._promised:
            return OCTETS
        return {**OCTETS, "Content-Range": f"{offset}-{self._promised - 1}"}

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
        digest = self._hash.result()
        if self._expected is not None:
            blob.check(digest, self._size, self._expected)
        commit(self._http, self._path, url, digest, self._what)
        return self._ended(blob.Stored(digest, self._size, sent))

    def _ended(self, stored: blob.Stored) -> blob.Stored:
        if self._journal is not None:
            self._journal.ended(self._name, stored.digest, stored.size)
        return stored

    def _cancel(self, url: str) -> None:
        cancel(self._http, url)


def commit(
    http: transport.Transport,
    path: str,
    url: str,
    digest: str,
    what: str,
    body: bytes | Iterator[memoryview] | None = None,
) -> None:
    """The PUT that ends an upload. One whose answer was lost has ended it all the same, so the blob is looked for."""
    try:
        http.request(
            "PUT", url, params={"digest": digest}, data=body, headers=OCTETS, ok=(201, 204), what=what
        )
    except (RegistryError, NotFoundError):
        try:
            http.request("HEAD", f"{path}/blobs/{digest}", ok=(200,), what=what)
        except (RegistryError, NotFoundError):
            pass
        else:
            return
        raise


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
    return urljoin(answer.url or "", location)
