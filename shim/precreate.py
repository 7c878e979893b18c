# SPDX-License-Identifier: Apache-2.0
"""podman's `precreate` stage: the devices that a container asks for, put into its specification by the hook.

For containers whose runtime is not cryoci-runtime. podman writes config.json as it means it to the hook's stdin, and
takes what it gets back (hooks.d(5); its own stage, which CRI-O does not know). It runs no hook on its restore.
"""

from __future__ import annotations

import json

from cryoci.errors import CryociError, UnsupportedError
from cryoci.shim import config
from cryoci.shim.devices import inject, request


def filtered(raw: bytes) -> bytes:
    """The specification with what it asks for; word for word what came in when it asks for nothing, or is none.

    Raises CryociError when a device that it asks for cannot be given: without it the container would run wrongly.
    What cryoci-runtime finds in the specification already, it leaves as it is.
    """
    try:
        spec = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    if not isinstance(spec, dict):
        return raw
    options = config.load().devices
    if not request.words(spec, options):
        return raw
    try:
        if inject.on_create(spec, options) is None:
            return raw
    except CryociError:
        raise
    except (
        Exception
    ) as e:  # whatever is in that specification: the container must not start without its device
        raise UnsupportedError(
            f"the devices that the container asks for cannot be put in: {type(e).__name__}: {e}",
            hint="give them by the engine's own option (podman --device), or use cryoci-runtime",
        ) from e
    return json.dumps(spec).encode()
