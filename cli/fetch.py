# SPDX-License-Identifier: Apache-2.0
"""cryoci fetch: a checkpoint to a directory, for cryoci-runtime; not for people, who have `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output


@click.command("fetch", hidden=True)
@click.argument("ref")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--pod-namespace", help="A pod of this Kubernetes namespace asks.")
@output.registry_options
def command(ref: str, directory: Path, pod_namespace: str | None, **where: Any) -> None:
    """Fetch REF to DIRECTORY, verified; prints JSON: where it is, its digest, its facts."""
    from cryoci.ociimage.fetch import fetch

    output.emit_json(
        fetch(ref, directory, pod_namespace=pod_namespace, registry_options=output.options(**where))
    )
