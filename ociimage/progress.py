# SPDX-License-Identifier: Apache-2.0
"""Progress: what a long transfer tells its caller; every method may be called from any thread."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives bytes as they pass. A token is whatever `start` returns."""

    def start(self, name: str, total: int | None) -> object:
        """A part named `name` of `total` bytes (None: unknown) begins."""

    def advance(self, token: object, n: int) -> None:
        """`n` more bytes of the part passed; negative when a part begins anew after a lost connection."""

    def done(self, token: object) -> None:
        """The part is complete."""


class Silent:
    """The Progress that says nothing."""

    def start(self, name: str, total: int | None) -> object:
        return None

    def advance(self, token: object, n: int) -> None:
        return None

    def done(self, token: object) -> None:
        return None
