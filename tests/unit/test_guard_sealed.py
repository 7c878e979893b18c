# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Guards and bakes that encrypt: what cannot be brought back is refused at the start, what is stored opens again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import Result

from cryoci.errors import TrustError, UsageError
from cryoci.ociimage import image, reference
from cryoci.ociimage.reference import RegistryRef
from cryoci.ociimage.seal import age
from cryoci.ociimage.seal.keyring import Identities, Recipients
from cryoci.shim import engines
from cryoci.uses import bake, guard
from cryoci.uses.guard_places import Repository, Sealing
from cryoci.uses.guard_state import Kept
from tests.unit.images import checkpoint, no_credentials, registry, tree_of  # noqa: F401
from tests.unit.test_seal_image import cryoci, identity, own, secret, to  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
PLACE = "registry.example:5000/guarded"


@pytest.fixture(autouse=True)
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import posix

    for name in ("CRYOCI_LIB", "CRYOCI_RUN"):
        monkeypatch.setitem(posix.environ, name.encode(), str(tmp_path / name).encode())

    def untouched(*_: object, **__: object) -> None:
        raise AssertionError("the container was looked for")

    monkeypatch.setattr(engines, "find", untouched)


def words(public: Path) -> str:
    """The recipient of an identity file."""
    return public.read_text().splitlines()[0].split(": ")[1]


def refused(*given: str) -> Result:
    """A guard that has not begun: nothing was looked at, and nothing noted."""
    result = cryoci("guard", "run", "web", *given)
    assert isinstance(result.exception, (UsageError, TrustError)), result
    return result


def test_what_cannot_work_is_refused_at_the_start(identity: Path, tmp_path: Path, own: Path) -> None:
    to = ("--encrypt-to", words(identity))
    key = ("--decrypt-key", str(identity))
    for place in ("disk", "tmpfs"):
        assert "for images, not directories" in str(refused(*to, *key, "--to", place).exception)
    assert "shares none" in str(refused(*to, *key, "--to", PLACE, "--incremental").exception)
    error = refused(*to, "--to", PLACE).exception
    assert isinstance(error, TrustError) and "no key here that opens" in str(error)
    assert "/etc/cryoci/decrypt" in (error.hint or "") and "--on-failure=none" in (error.hint or "")
    age.generate(own / "other")
    assert "no key here opens" in str(refused(*to, "--to", PLACE).exception)
    assert not (tmp_path / "CRYOCI_LIB/guard").exists()


@pytest.mark.parametrize("how", ["given", "of the node", "not needed", "in the clear"])
def test_what_can_be_brought_back_is_not_refused(identity: Path, own: Path, how: str) -> None:
    given = ["--to", PLACE, "--encrypt-to", words(identity)]
    if how == "given":
        given += ["--decrypt-key", str(identity)]
    elif how == "of the node":
        own.mkdir(0o700)
        identity.rename(own / "mine")
    elif how == "not needed":
        given.append("--on-failure=none")
    else:
        del given[2:]
    result = cryoci("guard", "run", "web", *given)
    assert isinstance(result.exception, AssertionError) and "looked for" in str(result.exception)


def test_a_guards_image_opens_with_its_key(
    registry: str, secret: Path, tmp_path: Path, identity: Path, to: Recipients
) -> None:
    target = reference.parse(f"{registry}/guarded:web-guard-1")
    assert isinstance(target, RegistryRef)
    pushed = image.push(secret, target, encrypt_to=to)
    kept = Kept(1, f"{registry}/guarded@{pushed.digest}", time.time(), 0.1, 1)
    place = reference.parse(f"{registry}/guarded")
    assert isinstance(place, RegistryRef)
    sealing = Sealing(to, Identities.load([identity]))
    with Repository(place, "web", None, sealing=sealing).open(kept) as directory:
        assert tree_of(directory) == tree_of(secret)
    with (
        pytest.raises(TrustError, match="no key was given"),
        Repository(place, "web", None).open(kept),
    ):
        raise AssertionError("it was opened")


def test_options_say_who_can_read(identity: Path, to: Recipients) -> None:
    """The guard itself refuses too, whoever makes it."""
    options = guard.Options(to="disk", sealing=Sealing(to, Identities.load([identity])))
    with pytest.raises(UsageError, match="not directories"):
        guard.Guard("web", options, print)


def test_a_bake_encrypts(identity: Path, to: Recipients, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def made(*_: object, **rest: object) -> None:
        given.update(rest)
        raise UsageError("that is all")

    monkeypatch.setattr(bake, "bake", made)
    line = ("-o", "web:1", "--ready-port=80", "--encrypt-to")
    assert "that is all" in str(cryoci("bake", *line, words(identity), "docker.io/web").exception)
    assert given["encrypt_to"] == to
    given.clear()
    assert "age1nonsense" in str(cryoci("bake", *line, "age1nonsense", "docker.io/web").exception)
    assert not given
