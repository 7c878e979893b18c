# SPDX-License-Identifier: Apache-2.0
"""cryoci verify: who signed a checkpoint image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cryoci.cli import output


@click.command("verify", short_help="Show who signed a checkpoint image.")
@click.argument("image_ref", metavar="IMAGE")
@click.option(
    "-k",
    "--key",
    "key_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Public key (PEM) that must have signed; repeatable, one is enough. Default: the policy's rule.",
)
@output.registry_options
@output.json_option
@output.quiet_option
def command(image_ref: str, key_files: tuple[Path, ...], as_json: bool, quiet: bool, **where: Any) -> None:
    """Verify the signatures of IMAGE: NAME in the local store, oci:LAYOUT:NAME, or HOST/REPO:TAG.

    With --key one of these keys must have signed it; without, what /etc/cryoci/policy.toml asks for is checked as
    a restore would. Exits 1 when nobody vouches for it. Signatures of cosign count as those of `cryoci sign`.

    \b
    Examples:
      cryoci verify --key prod.pub registry.example.com/team/counter:1
      cryoci verify registry.example.com/team/counter:1
    """
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference, stores
    from cryoci.ociimage.trust import policy, verify

    ref = reference.parse(image_ref)
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{image_ref} is no image, and only images are signed")
    options = output.options(**where)
    store = stores.open_store(ref, options)
    digest = store.get_manifest(stores.source_name(ref, store)).digest
    if key_files:
        found = verify.require(store, digest, key_files)
    else:
        rule = policy.rule_of(ref)
        found = verify.require(store, digest, rule.keys, policy.keyless_of(rule))
        policy.enforce(ref, digest, store=store)
    if as_json:
        output.emit_json(found)
        return
    click.echo(digest if quiet else f"verified {image_ref}@{digest}")
    if quiet:
        return
    for vouched in found.vouched:
        click.echo(f"  {vouched.key}: {vouched.predicate_type} ({vouched.kind})")
    for statement in found.provenance:
        _show(statement.predicate)


def _show(predicate: Any) -> None:
    """The parts of a provenance that a person asks for; it is signed, but may be of another tool's shape."""
    try:
        run, build = predicate["runDetails"], predicate["buildDefinition"]
        facts = [("signed on", run["builder"]["id"]), ("signed at", run["metadata"]["finishedOn"])]
        facts += sorted(build.get("internalParameters", {}).items())
        facts += [
            ("base image", f"{m.get('uri', '')}@sha256:{m.get('digest', {}).get('sha256', '?')}")
            for m in build.get("resolvedDependencies", [])
        ]
    except (KeyError, TypeError, AttributeError):
        return
    output.pairs([(f"  {name}", str(value)) for name, value in facts])
