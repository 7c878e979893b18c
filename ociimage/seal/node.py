# SPDX-License-Identifier: Apache-2.0
"""This node's own keys, which open what is restored here when nobody gives any: for engines, who cannot give one.

/etc/cryoci/decrypt/NAME     an age identity or an RSA key, as --decrypt-key takes it (0600); all are tried
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities

PLACE = Path("/etc/cryoci/decrypt")


def identities() -> Identities | None:
    """The keys of this node; None when it has none, or they are not for this user.

    Raises ConfigError for a file there that is no key, or that others may read.
    """
    try:
        files = sorted(path for path in PLACE.iterdir() if path.is_file() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    if not files:
        return None
    # imported here, because most nodes have no keys, and need no cryptography
    from cryoci.ociimage.seal.keyring import Identities

    return Identities.load(files)
