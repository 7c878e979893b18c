# SPDX-License-Identifier: Apache-2.0
"""The options by which verbs encrypt and decrypt, and the keys that they name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities, Recipients

F = TypeVar("F", bound=Callable[..., Any])

encrypt_option = click.option(
    "--encrypt-to",
    multiple=True,
    metavar="RECIPIENT",
    help="Encrypt the layers; repeatable, any one recipient can open them. An age recipient (age1...), or a "
    "file with such lines or an RSA public key. Names, sizes and annotations stay readable.",
)


def decrypt_options(command: F) -> F:
    """Add --decrypt-key and --decrypt-command; `identities` takes their values."""
    for option in (
        click.option(
            "--decrypt-command",
            metavar="COMMAND",
            help="Run this program and take what it prints for a key; no shell.",
        ),
        click.option(
            "--decrypt-key",
            multiple=True,
            metavar="FILE",
            type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
            help="Open an encrypted image with this age identity or RSA key (0600; - is stdin); repeatable. "
            "Who restores or unpacks needs none if it is in /etc/cryoci/decrypt/.",
        ),
    ):
        command = option(command)
    return command


def recipients(words: tuple[str, ...]) -> Recipients | None:
    """The Recipients of --encrypt-to; None when it was not given."""
    if not words:
        return None
    from cryoci.ociimage.seal.keyring import Recipients

    return Recipients.parse(words)


def identities(values: dict[str, Any], *, node: bool = False) -> Identities | None:
    """The Identities of `decrypt_options`, whose values are taken out of `values`; None when none is given.

    With `node` this node's own keys are taken then.
    """
    files, command = values.pop("decrypt_key"), values.pop("decrypt_command")
    if not files and command is None:
        if not node:
            return None
        from cryoci.ociimage.seal import node as here

        return here.identities()
    from cryoci.ociimage.seal.keyring import Identities

    return Identities.load(files, command)
