# SPDX-License-Identifier: Apache-2.0
"""A repository of an OCI registry (distribution-spec v1.1) as a store of images.

Bulk goes up as one streamed PATCH per blob: with docker-registry that is twice as fast as a PATCH per
16 MiB, and needs no digest in advance. Sources can be read again, so a broken upload asks the registry
how much it holds and streams the rest; a registry that refuses PATCH gets a monolithic PUT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from cryoci.errors import IntegrityError, RegistryError
from cryoci.ociimage import blob, journal, nearby, strictjson, transport, upload
from cryoci.ociimage.journal import Journal
from cryoci.ociimage.manifest import (
    INDEX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    MAX_MANIFEST,
    Descriptor,
    Index,
    digest_of,
)
from cryoci.ociimage.reference import RegistryRef
from cryoci.ociimage.transport import RegistryOptions

if TYPE_CHECKING:
    import requests

SMALL = 1 << 20  # bytes; a blob up to this is hashed before it is sent, and skipped when it is there
MAX_TAGS = 100_000
MAX_REFERRERS = 1000
_ACCEPT = ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))
_NO_REFERRERS = (400, 404, 405, 406, 501)  # answers of registries without the referrers API


class Registry:
    """The repository of a RegistryRef; its tag and digest do not matter here."""

    def __init__(self, ref: RegistryRef, options: RegistryOptions | None = None) -> None:
        self.repository = ref.repository
        self.host = ref.host
        self.transport = transport.Transport(ref.host, ref.repository, options or RegistryOptions())
        self.near = nearby.of_repository(ref.host, ref.repository)
        self._path = f"/v2/{ref.repository}"
        self._streams = True
        self._journal: Journal | None = None

    @contextmanager
    def remembering(self, what: str) -> Iterator[None]:
        """Keep an account of the push of `what`, so that one that does not end is taken up by the next.

        What was sent is skipped when the registry has it and the source gives the same again.
        """
        with journal.opened(f"{self.host}/{self.repository}", what) as self._journal:
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        """Nothing to hold: unreferenced blobs are the registry's to collect, and tags come last."""
        yield

    # blobs

    def has_blob(self, digest: str, size: int) -> bool:
        """HEAD of the blob; a wrong size counts as absent."""
        answer = self.transport.request(
            "HEAD", f"{self._path}/blobs/{digest}", ok=(200, 404), what=f"look for blob {digest}"
        )
        length = answer.headers.get("Content-Length")
        return answer.status_code == 200 and (length is None or length == str(size))

    def mount_blob(self, descriptor: Descriptor, repository: str) -> bool:
        """Have the registry take a blob over from another of its repositories; False when it does not."""
        try:
            answer = self.transport.request(
                "POST",
                f"{self._path}/blobs/uploads/",
                params={"mount": descriptor.digest, "from": repository},
                ok=(201, 202, 400, 403, 404, 405),
                what=f"mount blob {descriptor.digest} from {repository}",
            )
        except RegistryError:
            return False  # an upload says better what is wrong
        if answer.status_code == 202 and "Location" in answer.headers:
            # it opened an upload instead; ours would be another one
            upload.cancel(self.transport, self.transport.trusted(upload.location(answer)))
        return answer.status_code == 201

    def put_blob(
        self, source: blob.Source, expected: Descriptor | None, advance: Callable[[int], None]
    ) -> blob.Stored:
        """Upload a blob. Raises IntegrityError when the source is not what `expected` promises."""
        if expected is not None and self.has_blob(expected.digest, expected.size):
            advance(expected.size)
            return blob.Stored(expected.digest, expected.size, 0)
        if expected is None and (known := self._sent_before(source)) is not None:
            return known
        chunks = source.open()
        first, complete = _start(chunks)
        if complete:
            return self._put_small(first, expected, advance)
        transfer = upload.Upload(self.transport, self._path, source, expected, advance, self._journal)
        if self._streams:
            try:
                return transfer.stream(_chain(first, chunks))
            except upload.RefusedError:
                self._streams = False
        return transfer.monolithic()

    def _sent_before(self, source: blob.Source) -> blob.Stored | None:
        """What a push that did not end has sent, if the registry has it and `source` still is the same."""
        known = self._journal.stored(source.name) if self._journal is not None and source.name else None
        if known is None or not self.has_blob(known.digest, known.size):
            return None
        digest, size = blob.Digest(), 0
        for chunk in source.open():
            digest.update(chunk)
            size += len(chunk)
        return known if (digest.result(), size) == (known.digest, known.size) else None

    def _put_small(
        self, data: bytes, expected: Descriptor | None, advance: Callable[[int], None]
    ) -> blob.Stored:
        digest = digest_of(data)
        if expected is not None:
            blob.check(digest, len(data), expected)
        elif self.has_blob(digest, len(data)):
            advance(len(data))
            return blob.Stored(digest, len(data), 0)
        what = f"upload blob {digest}"
        answer = self.transport.request("POST", f"{self._path}/blobs/uploads/", ok=(202,), what=what)
        url = self.transport.trusted(upload.location(answer))
        upload.commit(self.transport, self._path, url, digest, what, data)
        advance(len(data))
        return blob.Stored(digest, len(data), len(data))

    def open_blob(self, descriptor: Descriptor) -> Iterator[bytes]:
        """Download a blob, verified; a lost connection is taken up again where it broke (Range)."""
        return blob.verified(self.raw_blob(descriptor), descriptor)

    def raw_blob(self, descriptor: Descriptor, start: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `start` on, not verified: for whoever does that himself."""
        if (near := nearby.chunks(self.near, descriptor, start)) is not None:
            yield from near
            return
        import requests
        import urllib3

        url, what = f"{self._path}/blobs/{descriptor.digest}", f"download blob {descriptor.digest}"
        offset, tries = start, 0
        while True:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            answer = self.transport.request(
                "GET", url, ok=(200, 206), what=what, headers=headers, stream=True
            )
            # a registry without ranges sends all of it again: what we have already is read and dropped
            drop = offset if answer.status_code == 200 else 0
            base = offset - drop
            try:
                while drop and (skipped := answer.raw.read(min(drop, blob.CHUNK))):
                    drop -= len(skipped)
                while chunk := answer.raw.read(blob.CHUNK):
                    offset += len(chunk)
                    yield chunk
                    if offset > descriptor.size:
                        return
                length = answer.headers.get("Content-Length")
                if offset >= descriptor.size or length is None or offset == base + int(length):
                    return  # all that the registry has; whoever verifies it says what is wrong
                reason = "it ended early"
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
                reason = str(e)
            finally:
                answer.close()
            tries += 1
            if tries >= self.transport.options.attempts:
                raise RegistryError(f"{what}: broke off at byte {offset}: {reason}", hint="try again later")
            transport.wait(tries + 1)

    # images

    def get_manifest(self, reference: str) -> blob.Fetched:
        """GET of a manifest or index; one that was asked for by digest must have it."""
        answer, data = self._read_manifest(reference)
        digest = digest_of(data)
        for promised in (reference, answer.headers.get("Docker-Content-Digest", "")):
            if promised.startswith("sha256:") and promised != digest:
                raise IntegrityError(
                    f"{self.host} returned other bytes for manifest {promised}: their digest is {digest}",
                    hint="it was altered in the registry or on its way; do not restore it",
                )
        media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        if media_type not in (*INDEX_TYPES, *MANIFEST_TYPES):
            value = strictjson.load_object(data, "manifest", limit=MAX_MANIFEST)
            media_type = str(value.get("mediaType"))
        return blob.Fetched(data, media_type, digest)

    def _read_manifest(self, reference: str) -> tuple[requests.Response, bytes]:
        """The answer and its body, asked for again when it breaks off."""
        import requests
        import urllib3

        what = f"fetch {self.host}/{self.repository}:{reference}"
        for left in reversed(range(self.transport.options.attempts)):
            answer = self.transport.request(
                "GET",
                f"{self._path}/manifests/{reference}",
                ok=(200,),
                what=what,
                headers={"Accept": _ACCEPT},
                stream=True,
            )
            data = b""
            try:
                while len(data) <= MAX_MANIFEST and (more := answer.raw.read(MAX_MANIFEST + 1 - len(data))):
                    data += more
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
                if not left:
                    raise RegistryError(f"{what}: it broke off: {e}", hint="try again later") from e
                transport.wait(self.transport.options.attempts - left)
                continue
            finally:
                answer.close()
            if len(data) > MAX_MANIFEST:
                raise RegistryError(
                    f"the manifest of {self.repository}:{reference} is over {MAX_MANIFEST} bytes"
                )
            return answer, data
        raise AssertionError

    def put_manifest(self, data: bytes, media_type: str, name: str | None) -> str:
        """PUT of a manifest or index under a tag, or under its digest."""
        digest = digest_of(data)
        self.transport.request(
            "PUT",
            f"{self._path}/manifests/{name or digest}",
            ok=(201, 202),
            what=f"store the manifest of {self.host}/{self.repository}:{name or digest}",
            data=data,
            headers={"Content-Type": media_type},
        )
        return digest

    def names(self) -> list[str]:
        """All tags of the repository, sorted. Raises NotFoundError when there is no such repository."""
        found = set[str]()
        url: str | None = f"{self._path}/tags/list?n=1000"
        while url and len(found) < MAX_TAGS:
            answer = self.transport.request(
                "GET", url, ok=(200,), what=f"list {self.host}/{self.repository}"
            )
            tags = strictjson.load_object(answer.content, "tag list", limit=MAX_MANIFEST).get("tags") or []
            before = len(found)
            found.update(tag for tag in tags if isinstance(tag, str))
            url = self._next(answer) if len(found) > before else None
        return sorted(found)

    def referrers(self, digest: str) -> list[Descriptor] | None:
        """The referrers API's answer, all pages of it; None when the registry has no such API."""
        found: list[Descriptor] = []
        url: str | None = f"{self._path}/referrers/{digest}"
        while url and len(found) < MAX_REFERRERS:
            what = f"list what refers to {self.host}/{self.repository}@{digest}"
            answer = self.transport.request("GET", url, ok=(200, *_NO_REFERRERS), what=what)
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
            if answer.status_code != 200 or kind != INDEX:
                return None
            more = Index.parse(answer.content).manifests
            found += more
            url = self._next(answer) if more else None
        return found

    def _next(self, answer: requests.Response) -> str | None:
        """The address of a list's next page."""
        link = re.match(r'<([^>]+)>;\s*rel="?next"?', answer.headers.get("Link", ""))
        if link and urlsplit(link[1]).netloc not in ("", urlsplit(self.transport.base).netloc):
            raise RegistryError(f"{self.host} continues its list at another host")
        return link[1] if link else None

    def delete_manifest(self, reference: str) -> bool:
        """DELETE by tag or digest; False when the registry does not do it for this kind of reference."""
        answer = self.transport.request(
            "DELETE",
            f"{self._path}/manifests/{quote(reference, safe=':')}",
            ok=(202, 200, 204) if reference.startswith("sha256:") else (200, 202, 204, 400, 405, 404),
            what=f"delete {self.host}/{self.repository}:{reference}",
        )
        return answer.status_code in (200, 202, 204)


def _start(chunks: Iterator[bytes]) -> tuple[bytes, bool]:
    """Up to SMALL bytes and a bit from the front, and whether that is all."""
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) > SMALL:
            return first, False
    return first, True


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
