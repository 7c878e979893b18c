# SPDX-License-Identifier: Apache-2.0
"""References: the words with which a user names a checkpoint.

    /path, ./path, ../path          a checkpoint directory, or an archive file when it ends in .tar[.gz|.zst]
    oci:LAYOUT[:NAME][@DIGEST]      an image in an OCI layout; LAYOUT holds no colon (as in skopeo's oci:)
    HOST[:PORT]/REPO[:TAG][@DIGEST] an image in a registry; HOST has a dot, a port, or is localhost
    NAME[:TAG][@DIGEST]             an image in the local store (/var/lib/cryoci/images, or $CRYOCI_STORE)

The registry grammar is that of github.com/distribution/reference, without its docker.io default: a
checkpoint holds the memory of a process and must never travel to a registry that nobody named.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from cryoci.errors import UsageError

DEFAULT_STORE = "/var/lib/cryoci/images"
DEFAULT_TAG = "latest"
STORAGE = "containers-storage:"  # a target of push: the images of podman, buildah and CRI-O on this node
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tzst")
MAX_LENGTH = 4096

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z"
)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?\Z")
# image-spec annotations.md, org.opencontainers.image.ref.name; "@" left out: it opens a digest here
_NAME = re.compile(
    r"[A-Za-z0-9]+(?:(?:--|[-._:+])[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:--|[-._:+])[A-Za-z0-9]+)*)*\Z"
)

_HINT = (
    "give a directory (./DIR), an archive (FILE.tar), oci:LAYOUT:NAME, HOST/REPO:TAG, or a name in the store"
)


@dataclass(frozen=True)
class DirectoryRef:
    """A checkpoint directory."""

    path: Path

    def __str__(self) -> str:
        return _path_text(self.path)


@dataclass(frozen=True)
class ArchiveRef:
    """A tar file (plain, gzip or zstd), as `podman container checkpoint --export` writes it."""

    path: Path

    def __str__(self) -> str:
        return _path_text(self.path)


@dataclass(frozen=True)
class LayoutRef:
    """An image, by name or digest, in the OCI image layout at `path`; neither names the whole layout."""

    path: Path
    name: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        return _suffixed(f"oci:{self.path}", self.name, self.digest)


@dataclass(frozen=True)
class RegistryRef:
    """An image, by tag or digest, in the repository of a registry; a digest wins over a tag."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        return _suffixed(f"{self.host}/{self.repository}", self.tag, self.digest)


Reference = DirectoryRef | ArchiveRef | LayoutRef | RegistryRef


def default_store() -> Path:
    """The local store: $CRYOCI_STORE, else /var/lib/cryoci/images."""
    return Path(os.environ.get("CRYOCI_STORE") or DEFAULT_STORE)


def parse(text: str) -> Reference:
    """Read a reference; see the grammar above. Raises UsageError naming the part that is off."""
    if not text or len(text) > MAX_LENGTH or any(ord(c) < 0x21 or ord(c) == 0x7F for c in text):
        raise UsageError(f"not a reference: {text[:80]!r} is empty, too long, or holds blanks", hint=_HINT)
    if text.startswith(("http://", "https://")):
        raise UsageError(f"not a reference: {text}", hint=f"leave the scheme out: {text.split('://', 1)[1]}")
    if text.startswith("oci:"):
        return _parse_layout(text)
    if text.startswith("docker://"):
        return _parse_registry(text.removeprefix("docker://"), text)
    if text.startswith(("/", "./", "../")) or text in (".", ".."):
        path = Path(text)
        return ArchiveRef(path) if text.endswith(ARCHIVE_SUFFIXES) or path.is_file() else DirectoryRef(path)
    head, slash, _ = text.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost"):
        return _parse_registry(text, text)
    if text.endswith(ARCHIVE_SUFFIXES):
        return ArchiveRef(Path(text))
    return _parse_stored(text)


def _parse_layout(text: str) -> LayoutRef:
    body, digest = _split_digest(text.removeprefix("oci:"), text)
    path, colon, name = body.partition(":")
    if not path:
        raise UsageError(
            f"not a reference: {text} names no layout directory", hint="write oci:/DIRECTORY:NAME"
        )
    if colon and not _NAME.match(name):
        raise UsageError(
            f"not a reference: {text} has a bad image name {name!r}",
            hint="a name is letters and digits with - . _ : + / between them; LAYOUT holds no colon",
        )
    return LayoutRef(Path(path), name if colon else None, digest)


def _parse_registry(body: str, text: str) -> RegistryRef:
    body, digest = _split_digest(body, text)
    host, slash, rest = body.partition("/")
    if not slash or not _HOST.match(host) or not rest:
        raise UsageError(f"not a reference: {text} has no HOST/REPOSITORY", hint=_HINT)
    if (port := host.rpartition("]")[2].partition(":")[2]) and not 0 < int(port) < 65536:
        raise UsageError(f"not a reference: {text} has port {port}", hint="a port is 1 to 65535")
    repository, colon, tag = rest.partition(":")
    if not _REPOSITORY.match(repository) or len(host) + len(repository) > 254:
        hint = (
            f"repository names are lower case: {repository.lower()}"
            if repository.lower() != repository
            else _HINT
        )
        raise UsageError(f"not a reference: {text} has a bad repository {repository!r}", hint=hint)
    if colon and not _TAG.match(tag):
        raise UsageError(
            f"not a reference: {text} has a bad tag {tag!r}",
            hint="a tag is up to 128 letters, digits, _ . -",
        )
    return RegistryRef(host, repository, tag if colon else None, digest)


def _parse_stored(text: str) -> LayoutRef:
    body, digest = _split_digest(text, text)
    if not _NAME.match(body):
        raise UsageError(f"not a reference: {text}", hint=_HINT)
    name = body if ":" in body.rpartition("/")[2] or digest else f"{body}:{DEFAULT_TAG}"
    return LayoutRef(default_store(), name, digest)


def _split_digest(body: str, text: str) -> tuple[str, str | None]:
    rest, at, digest = body.partition("@")
    if not at:
        return body, None
    if not _DIGEST.match(digest):
        raise UsageError(
            f"not a reference: {text} has a bad digest {digest!r}",
            hint="a digest is sha256: and 64 hex digits",
        )
    return rest, digest


def _suffixed(text: str, name: str | None, digest: str | None) -> str:
    return text + (f":{name}" if name else "") + (f"@{digest}" if digest else "")


def _path_text(path: Path) -> str:
    text = str(path)
    return text if text.startswith(("/", "./", "../")) or text in (".", "..") else f"./{text}"
