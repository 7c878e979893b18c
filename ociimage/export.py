# SPDX-License-Identifier: Apache-2.0
"""A checkpoint directory as one tar file, as podman's --export and CRI-O write it; checkpointctl reads it."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from cryoci import files
from cryoci.errors import ConflictError, SpaceError
from cryoci.ociimage import archive, frames, layers
from cryoci.ociimage.progress import Progress, Silent
from cryoci.ociimage.reference import ArchiveRef

_CODECS = {".gz": "gzip:1", ".tgz": "gzip:1", ".zst": "zstd:1", ".zstd": "zstd:1", ".tzst": "zstd:1"}


@dataclass(frozen=True)
class Exported:
    """An archive that was written: `size` bytes on disk, `raw_size` bytes of files."""

    path: Path
    size: int
    raw_size: int
    seconds: float


def export(directory: Path, ref: ArchiveRef, *, progress: Progress | None = None) -> Exported:
    """Write the checkpoint in `directory` to an archive; its suffix (.tar, .gz, .zst) picks the compression.

    The file appears when it is whole. Raises ConflictError when it exists, ImageError, SpaceError.
    """
    began = time.monotonic()
    progress = progress or Silent()
    checkpoint = archive.validate(directory)
    if os.path.lexists(ref.path):
        raise ConflictError(f"{ref.path} exists", hint="name another file, or remove it")
    compression = layers.Compression.parse(_CODECS.get(ref.path.suffix, "none"))
    plan = layers.Plan("archive", checkpoint.files, checkpoint.folders, checkpoint.has_parent)
    token = progress.start(ref.path.name, plan.raw_size)
    part = ref.path.with_name(f".{ref.path.name}.{secrets.token_hex(4)}.partial")
    try:
        with frames.Pool(compression) as pool, open(part, "xb", opener=_private) as out:
            writer = layers.Writer(directory, plan, pool, lambda n: progress.advance(token, n))
            for frame in writer.open():
                out.write(frame)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        os.rename(part, ref.path)
    except OSError as e:
        part.unlink(missing_ok=True)
        if e.errno == 28:
            raise SpaceError(
                f"no space left for {ref.path}", hint="free space, or name another place"
            ) from e
        raise
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    files.sync_directory(ref.path.absolute().parent)
    progress.done(token)
    return Exported(ref.path, size, checkpoint.size, time.monotonic() - began)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
