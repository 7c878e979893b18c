# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose making is told: CRIU and cryoci-runtime write files, which can be watched as they grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cryoci.ociimage.progress import Work, growing
from cryoci.shim.engines import processes
from cryoci.shim.engines.checkpoint import Checkpoint, checkpoint
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import DumpOptions


@contextmanager
def dumping(container: Container, directory: Path, options: DumpOptions, work: Work) -> Iterator[Checkpoint]:
    """`checkpoint`, told to `work` until the with block begins. Raises what that does."""
    with ExitStack() as told:
        progress = told.enter_context(work(f"dump {container.name}"))
        # about: pages that are zero are not written, and files come on top
        expected = processes.private_memory(container.pid)
        told.enter_context(growing(progress, directory, expected or None))
        with checkpoint(container, directory, options) as done:
            told.close()
            yield done
