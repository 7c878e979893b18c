# SPDX-License-Identifier: Apache-2.0
"""cryoci inspect: what a checkpoint holds, wherever it lies, without restoring it."""

from __future__ import annotations

from typing import Any

import click

from cryoci.cli import output, sealing


@click.command("inspect", short_help="Show what a checkpoint holds.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--pid", type=int, metavar="PID", help="Only this process and those below it.")
@click.option("--files", is_flag=True, help="Show the open files of each process.")
@click.option("--sockets", is_flag=True, help="Show the sockets of each process.")
@click.option("--mounts", is_flag=True, help="Show the container's mounts.")
@click.option("--stats", is_flag=True, help="Show what CRIU measured.")
@click.option("--annotations", is_flag=True, help="Show every annotation.")
@click.option("--cmd", is_flag=True, help="Show command lines. Fetches memory.")
@click.option("--env", is_flag=True, help="Show environments. Fetches memory; they may hold secrets.")
@click.option("--all", "show_all", is_flag=True, help="All of the above but --env.")
@click.option("--fetch", is_flag=True, help="Fetch layers that do not say what they hold, however large.")
@sealing.decrypt_options
@output.registry_options
@output.page_option
@output.json_option
def command(references: tuple[str, ...], page: str | None, as_json: bool, **rest: Any) -> None:
    """Show each REF: an image (NAME, oci:LAYOUT:NAME, HOST/REPO:TAG), a directory, or an engine's archive.

    Of an image only its manifest and its small first layer are read, so this is quick for any size; memory
    is fetched only for --cmd and --env. The last part compares the checkpoint with this node. --json prints
    everything that was read (docs/schema/inspect.json). Of an encrypted image only the manifest is shown without a
    key (--decrypt-key, --decrypt-command).

    \b
    Examples:
      cryoci inspect counter:1
      cryoci inspect --report counter.html counter:1
      cryoci inspect --all ./podman-export.tar.zst
      cryoci inspect --json registry.example.com/team/counter:1
    """
    from cryoci.cli import node, render
    from cryoci.errors import UsageError
    from cryoci.ociimage import reference, report
    from cryoci.uses.report import write

    if page and len(references) > 1:
        raise UsageError("--report is of one checkpoint", hint="name one REF")
    shown = {key: rest.pop(key) for key in ("files", "sockets", "mounts", "stats", "annotations", "cmd")}
    everything, env, pid, fetch = (rest.pop(key) for key in ("show_all", "env", "pid", "fetch"))
    shown = {key: value or everything for key, value in shown.items()}
    here = node.here()
    identities = sealing.identities(rest)
    if page:
        ref = reference.parse(references[0])
        write(page, ref, node=here, registry_options=output.options(**rest), identities=identities)
        if not as_json:
            click.echo(f"wrote {page}")
            return
    with output.progress(as_json) as progress:
        found = [
            report.inspect(
                reference.parse(text),
                node=here,
                memory=shown["cmd"] or env,
                everything=fetch,
                progress=progress,
                registry_options=output.options(**rest),
                identities=identities,
            )
            for text in references
        ]
    if as_json:
        output.emit_json(found[0] if len(found) == 1 else found)
        return
    for number, one in enumerate(found):
        if number:
            click.echo()
        render.report(one, render.Shown(**shown, env=env, pid=pid))
