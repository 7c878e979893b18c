# SPDX-License-Identifier: Apache-2.0
"""An image's layers, sealed and opened: one key per image, fresh for every push, and one of its own per layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from cryoci.errors import ImageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage.manifest import ENCRYPTED, Descriptor
from cryoci.ociimage.seal import keyring, stream
from cryoci.ociimage.seal.keyring import Identities, Recipients

Opener = Callable[[Iterable[bytes]], Iterator[bytes]]


class Seal:
    """What one push needs: `annotations` for every layer, and a Sealer for each."""

    def __init__(self, recipients: Recipients, media_type: str, titles: Sequence[str]) -> None:
        self.media_type = media_type + ENCRYPTED
        self._key = os.urandom(stream.KEY)
        self._plain_type, self._titles = media_type, titles
        self.annotations = recipients.wrap(self._key)

    def sealer(self, title: str) -> stream.Sealer:
        """The Sealer of the layer with this title."""
        place = stream.Place(self._titles.index(title), len(self._titles), title, self._plain_type)
        return stream.Sealer(stream.layer_key(self._key, place))


def openers(layers: Sequence[Descriptor], identities: Identities | None) -> list[Opener]:
    """For each layer a function that gives its compressed content; all are sealed, or none.

    Raises TrustError without a fitting key, ImageError for an image in which somebody put a layer in the clear.
    """
    sealed = [layer.media_type.endswith(ENCRYPTED) for layer in layers]
    if not any(sealed):
        return [iter for _ in layers]
    if not all(sealed):
        raise ImageError(
            "some layers of the image are encrypted and some are not",
            hint="somebody without the key may have put them there: do not restore it",
        )
    known: dict[tuple[str | None, ...], bytes] = {}
    result: list[Opener] = []
    for number, layer in enumerate(layers):
        noted = layer.annotations
        wrapped = tuple(noted.get(k) for k in (keyring.AGE_KEYS, keyring.JWE_KEYS, keyring.PUBLIC_OPTIONS))
        if wrapped not in known:
            known[wrapped] = (identities or Identities()).unwrap(noted)
        place = stream.Place(
            number,
            len(layers),
            noted.get(families.LAYER_KIND, ""),
            layer.media_type.removesuffix(ENCRYPTED),
        )
        key = stream.layer_key(known[wrapped], place)
        result.append(lambda records, key=key: stream.unseal(key, records))  # type: ignore[misc]
    if len(known) > 1:
        raise ImageError("the layers of the image are encrypted under different keys: it was put together")
    return result
