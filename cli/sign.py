# SPDX-License-Identifier: Apache-2.0
"""cryoci sign: vouch for a checkpoint image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output, secrets


@click.command("sign", short_help="Sign a checkpoint image, as cosign does.")
@click.argument("image_ref", metavar="IMAGE")
@click.option(
    "-k",
    "--key",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Private key: one that cosign or `cryoci keygen` made, or ECDSA P-256 in PEM.",
)
@secrets.password_option
@click.option(
    "--provenance/--no-provenance",
    default=True,
    show_default=True,
    help="State as well where it comes from: node, engine, versions, base image.",
)
@output.registry_options
@output.json_option
@output.quiet_option
def command(
    image_ref: str,
    key: Path,
    password_file: Path | None,
    provenance: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Sign IMAGE: NAME in the local store, oci:LAYOUT:NAME, HOST/REPO:TAG, or any of them @DIGEST.

    The signature lies beside the image, in both forms that cosign knows (tag sha256-HEX.sig, and a sigstore
    bundle as referrer), for the index and for the manifest in it. Give the digest that the push printed: a tag may
    lead elsewhere by now. No transparency log is asked.

    \b
    Examples:
      cryoci sign --key prod.key registry.example.com/team/counter@sha256:0123...
      cosign verify --key prod.pub --insecure-ignore-tlog=true registry.example.com/team/counter:1
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference
    from cryoci.ociimage.trust import keys
    from cryoci.ociimage.trust.sign import sign

    ref = reference.parse(image_ref)
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{image_ref} is no image, and only images can be signed", hint="push it first")
    private = keys.load_private(key, lambda: secrets.password(password_file, f"Password for {key}"))
    done = sign(ref, private, with_provenance=provenance, registry_options=output.options(**where))
    if as_json:
        output.emit_json(done)
    elif quiet:
        click.echo(done.digest)
    else:
        click.echo(f"signed {done.reference}" + (" and its provenance" if done.provenance else ""))
        for digest in done.digests:
            click.echo(f"digest {digest}")
