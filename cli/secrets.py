# SPDX-License-Identifier: Apache-2.0
"""Passwords on their way in: from a file, the environment or a terminal, never from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

ENVIRONMENT = ("CRYOCI_KEY_PASSWORD", "COSIGN_PASSWORD")


def password(file: Path | None, prompt: str, *, confirm: bool = False) -> bytes:
    """The password in `file` (its first line), $CRYOCI_KEY_PASSWORD, $COSIGN_PASSWORD, or typed when asked.

    Raises UsageError when there is nobody to ask.
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage.trust import keys

    if file is not None:
        return keys.read_file(file).split(b"\n", 1)[0].removesuffix(b"\r")
    for name in ENVIRONMENT:
        if name in os.environ:
            return os.environb[name.encode()]
    if not sys.stdin.isatty():
        raise UsageError(
            "the key needs a password, and there is no terminal to ask at",
            hint=f"name a --password-file, or set {ENVIRONMENT[0]}",
        )
    typed: str = click.prompt(prompt, hide_input=True, default="", show_default=False, err=True)
    if confirm and click.prompt("Again", hide_input=True, default="", show_default=False, err=True) != typed:
        raise UsageError("the two passwords differ")
    return typed.encode()


password_option = click.option(
    "--password-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Read the key's password from the first line of this file. Default: $CRYOCI_KEY_PASSWORD, "
    "$COSIGN_PASSWORD, or typed at the terminal.",
)
