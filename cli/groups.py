# SPDX-License-Identifier: Apache-2.0
"""Groups of verbs that are verbs themselves."""

from __future__ import annotations

import click


class RunByDefault(click.Group):
    """`VERB WORD` is `VERB run WORD`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)
