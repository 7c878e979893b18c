# SPDX-License-Identifier: Apache-2.0
"""cryoci doctor: why checkpoint or restore does not work here, asked of a node, a container, an image or a log."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from cryoci.cli import output

if TYPE_CHECKING:
    from cryoci.shim.doctor.check import Check


@click.command("doctor", short_help="Say what keeps checkpoints from working here.")
@click.argument("subject", metavar="[CONTAINER|IMAGE|DIRECTORY|LOG]", required=False)
@click.option("--fix-hints", is_flag=True, help="Show what to do about warnings too.")
@click.option(
    "--runtime-root", metavar="DIR", help="Look for the container in runc or crun under this root."
)
@output.registry_options
@output.json_option
def command(
    subject: str | None, fix_hints: bool, runtime_root: str | None, as_json: bool, **where: Any
) -> None:
    """Check this node; or a running CONTAINER, a checkpoint (IMAGE, DIRECTORY) against this node, or a LOG of CRIU.

    The exit status is 0 when nothing fails and 1 when something does.

    \b
    Examples:
      cryoci doctor
      cryoci doctor --fix-hints web
      cryoci doctor registry.example.com/checkpoints/web:1
      cryoci doctor ./web-checkpoint
      cryoci doctor /run/cryoci/containers/default/web/dump.log
    """
    from pathlib import Path

    from cryoci.errors import NotFoundError
    from cryoci.shim.doctor import node
    from cryoci.shim.doctor.check import Facts

    if subject is None:
        checks = node.examine(Facts())
    elif Path(subject).is_file():
        from cryoci.cli.explain import show

        show(subject, as_json)
        return
    else:
        found = None
        if not any(mark in subject for mark in "/:@"):
            from cryoci.shim.doctor import container_gpu as container
            from cryoci.shim.doctor import subject as subjects

            try:
                found = container.examine(subjects.container(subject, root=runtime_root))
            except NotFoundError:
                if runtime_root is not None:
                    raise
        checks = found if found is not None else _image(subject, where)
    report = node.report(subject or "node", checks)
    if as_json:
        output.emit_json(report)
    else:
        _print(checks, fix_hints)
    sys.exit(0 if report["ok"] else 1)


def _image(subject: str, where: dict[str, Any]) -> list[Check]:
    from cryoci.errors import NotFoundError, UsageError
    from cryoci.ociimage import contents, image, reference, report
    from cryoci.shim.criu import cpuinfo
    from cryoci.shim.doctor import image as checks
    from cryoci.shim.doctor.check import Facts

    ref = reference.parse(subject)
    if isinstance(ref, reference.DirectoryRef):
        from cryoci.uses.agent import gpu_facts

        with contents.opened(ref) as found:
            facts = {**report.facts_of(found), **gpu_facts(found.directory)}
            return checks.examine(Facts(), facts, str(found.directory / "checkpoint"))
    if not isinstance(ref, (reference.LayoutRef, reference.RegistryRef)):
        raise UsageError(f"{subject} is neither a container, an image nor a log", hint="see `cryoci list`")
    registry = output.options(**where)
    try:
        info = image.inspect(ref, registry_options=registry)
    except NotFoundError as e:
        raise NotFoundError(f"{e.message}; nor is there a container {subject}", hint=e.hint) from e
    name = f"checkpoint/{cpuinfo.NAME}"
    with contents.opened(ref, lambda file: file == name, registry_options=registry) as found:
        images = str(found.directory / "checkpoint")
        return checks.examine(Facts(), {"host.arch": info.architecture, **info.facts}, images)


def _print(checks: list[Check], fix_hints: bool) -> None:
    colors = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "bright_black"}
    width = max(len(c.id) for c in checks)
    for c in checks:
        mark = click.style(f"{c.verdict:<4}", fg=colors[c.verdict])
        click.echo(f"{mark}  {c.id:<{width}}  {output.printable(c.found)}")
        if c.fix and (c.verdict == "fail" or fix_hints):
            click.echo(f"      {'':<{width}}  fix: {output.printable(c.fix)}")
    count = {v: sum(c.verdict == v for c in checks) for v in colors}
    click.echo(
        f"{count['ok']} ok, {count['warn']} warnings, {count['fail']} failures, {count['skip']} skipped"
    )
