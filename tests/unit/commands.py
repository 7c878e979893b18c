# SPDX-License-Identifier: Apache-2.0
"""cryoci's commands, called in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from cryoci.cli import main


def cryoci(*words: str) -> Result:
    """What a command came to."""
    return CliRunner().invoke(main.cli, words)


def says(*words: str) -> str:
    """What a command that must succeed prints."""
    done = cryoci(*words)
    assert done.exit_code == 0, done.exception
    return done.output
