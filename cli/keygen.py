# SPDX-License-Identifier: Apache-2.0
"""cryoci keygen: key pairs for signing and for encryption."""

from __future__ import annotations

from pathlib import Path

import click

from cryoci.cli import secrets


@click.command("keygen", short_help="Make a key pair for signing, or for encryption.")
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option(
    "--seal", is_flag=True, help="A pair for encryption: an age identity, as age-keygen makes it, in PREFIX."
)
@secrets.password_option
def command(prefix: Path, seal: bool, password_file: Path | None) -> None:
    """Make PREFIX.key, encrypted under a password, and PREFIX.pub, for `cryoci sign` and cosign.

    With --seal, make the file PREFIX with an age identity for `--decrypt-key` (keep it 0600, where checkpoints are
    restored), and print its recipient for `--encrypt-to`. It has no password: whoever reads it reads them all.

    \b
    Examples:
      cryoci keygen prod                 prod.key and prod.pub, as `cosign generate-key-pair`
      cryoci keygen --seal node-b.txt    prints age1...
      cryoci keygen --seal /etc/cryoci/decrypt/node-b     for this node, whoever restores on it
    """
    from cryoci.ociimage.trust import keys

    if seal:
        from cryoci.ociimage.seal import age

        click.echo(age.generate(prefix))
        return
    public = keys.generate(
        prefix, secrets.password(password_file, f"Password for {prefix}.key", confirm=True)
    )
    click.echo(f"{prefix}.key and {public.source}; id {public.id}")
