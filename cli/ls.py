# SPDX-License-Identifier: Apache-2.0
"""cryoci ls: `cryoci list` by its short name."""

from cryoci.cli.list import command

__all__ = ["command"]
