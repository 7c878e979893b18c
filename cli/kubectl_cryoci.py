# SPDX-License-Identifier: Apache-2.0
"""`kubectl cryoci`: the plugin of kubectl. kubectl finds it as the program kubectl-cryoci on PATH."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cryoci import __version__
from cryoci.cli import main as program
from cryoci.cli import output


def _cluster(command: Callable[..., Any]) -> Callable[..., Any]:
    """kubectl's own options about which cluster."""
    for option in (
        click.option("--context", help="Context of the kubeconfig."),
        click.option("--kubeconfig", help="Kubeconfig to use."),
        click.option("-n", "--namespace", help="Namespace of the pod. Default: the context's."),
    ):
        command = option(command)
    return command


def _kubectl(values: dict[str, Any]) -> Any:
    from cryoci.command import which
    from cryoci.uses.kubectl import Kubectl

    which("kubectl", package="kubernetes-client")
    flags = [f"--{name}={value}" for name in ("context", "kubeconfig") if (value := values.pop(name))]
    return Kubectl(tuple(flags), values.pop("namespace"))


def _say(quiet: bool) -> Callable[[str], None]:
    """How to tell of a long wait, on stderr."""
    return (lambda line: None) if quiet else output.note


@click.group(
    "kubectl-cryoci", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="kubectl-cryoci")
def cli() -> None:
    """Checkpoint containers of pods, and restore them in new pods, on any node.

    \b
    Examples:
      kubectl cryoci doctor
      kubectl cryoci checkpoint web -n shop
      kubectl cryoci push web --to registry.example:5000/checkpoints
      kubectl cryoci list --from registry.example:5000/checkpoints
      kubectl cryoci restore web --image registry.example:5000/checkpoints:TAG
    """


@cli.command()
@click.argument("pod")
@click.option("-c", "--container", help="Which container. Default: the only one.")
@click.option(
    "--timeout", default="4m", show_default=True, metavar="TIME", help="Time that the node may take."
)
@_cluster
@output.json_option
@output.quiet_option
def checkpoint(
    pod: str, container: str | None, timeout: str, as_json: bool, quiet: bool, **rest: Any
) -> None:
    """Checkpoint a container of POD into an archive on its node; it runs on."""
    from cryoci import durations
    from cryoci.uses import kube

    made = kube.checkpoint(_kubectl(rest), pod, container, durations.parse(timeout), _say(quiet))
    if as_json:
        output.emit_json(made)
    elif quiet:
        click.echo(made.path)
    else:
        click.echo(f"checkpointed {made.namespace}/{made.pod} container {made.container}")
        click.echo(f"archive {made.path} on node {made.node}")


@cli.command()
@click.argument("pod")
@click.option("-c", "--container", help="Which container. Default: the only one.")
@click.option("--to", required=True, metavar="HOST/REPO", envvar="CRYOCI_AGENT_TO", help="The agents' --to.")
@click.option(
    "--timeout", default="4m", show_default=True, metavar="TIME", help="Time for the dump, then the push."
)
@click.option("--signed", is_flag=True, help="Wait until the agent has signed it, too.")
@_cluster
@output.registry_options
@output.json_option
@output.quiet_option
def push(
    pod: str,
    container: str | None,
    to: str,
    timeout: str,
    signed: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Checkpoint a container of POD, and wait until the agent of its node has pushed the image."""
    from cryoci import durations
    from cryoci.uses import kube

    limit = durations.parse(timeout)
    made = kube.checkpoint(_kubectl(rest), pod, container, limit, _say(quiet))
    reference, digest = kube.await_image(
        made, to, limit, output.options(**rest), signed=signed, say=_say(quiet)
    )
    if as_json:
        output.emit_json({"checkpoint": made, "reference": reference, "digest": digest})
    elif quiet:
        click.echo(digest)
    else:
        click.echo(f"pushed {reference}")
        click.echo(f"digest {digest}")


@cli.command("list")
@click.argument("pod", required=False)
@click.option(
    "--from", "repository", required=True, metavar="HOST/REPO", envvar="CRYOCI_AGENT_TO", help="Where."
)
@click.option("-c", "--container", help="Only images of this container. Default: of all.")
@click.option("-n", "--namespace", help="Only images of pods in it. Default: in all.")
@output.registry_options
@output.json_option
@output.quiet_option
def list_(
    pod: str | None,
    container: str | None,
    namespace: str | None,
    repository: str,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """List the images that agents have pushed, of POD or of all. It asks the registry, not the cluster."""
    from cryoci.uses import kube

    found = kube.images(repository, pod, output.options(**where), namespace=namespace, container=container)
    if as_json:
        output.emit_json(found)
    elif quiet:
        for one in found:
            click.echo(output.printable(one.name))
    else:
        rows = [
            (one.name, one.container_name, one.created, output.size(one.size), one.problem) for one in found
        ]
        output.table(("IMAGE", "CONTAINER", "CREATED", "SIZE", "PROBLEM"), rows)


@cli.command()
@click.argument("pod")
@click.option("--image", required=True, metavar="REF", help="HOST/REPO:TAG or @DIGEST of the checkpoint.")
@click.option("-c", "--container", help="Which container of the pod. Default: the only one.")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The pod as JSON (kubectl get pod -o json), when it is no longer in the cluster.",
)
@click.option("--name", help="Name of the new pod. Default: POD-restored.")
@click.option("--node", help="Restore on this node.")
@click.option(
    "--runtime-class", default="cryoci", show_default=True, help="The RuntimeClass of cryoci-runtime."
)
@click.option(
    "--any-node",
    is_flag=True,
    help="Do not look at the image, and let the scheduler try any node: GPUs and architecture may not fit.",
)
@click.option(
    "--keep-labels",
    is_flag=True,
    help="Keep all labels, also those by which the old pod's controller takes the new one for its own, and may "
    "delete it.",
)
@click.option("--dry-run", is_flag=True, help="Print the pod instead of creating it.")
@_cluster
@output.registry_options
@output.json_option
def restore(
    pod: str,
    image: str,
    container: str | None,
    manifest: Path | None,
    name: str | None,
    node: str | None,
    runtime_class: str,
    any_node: bool,
    keep_labels: bool,
    dry_run: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Create a pod like POD, one of whose containers goes on from the checkpoint image REF.

    It is scheduled where the image can be restored: on a node with the same chip and driver, if it used GPUs (labels
    of the agent or of gpu-feature-discovery). When there is none, it says what each node lacks and creates nothing.

    Its other containers start anew. The new pod belongs to no controller; Services still find it by its labels. Where
    the old one's controller selects by the same labels, one of them is left out, and named: else the controller would
    take the new pod for one too many.
    """
    from cryoci.files import read_json
    from cryoci.uses import kube, kube_fit, kube_labels

    kubectl = _kubectl(rest)
    options = output.options(**rest)
    source = read_json(manifest) if manifest else kubectl.get("pod", pod)
    pinned, wanted = (image, kube_fit.Needs()) if any_node else kube.look(image, options)
    fresh = kube.restoring(
        source,
        container,
        pinned,
        name=name,
        node=node,
        runtime_class=runtime_class,
        wanted=wanted,
        keep_labels=keep_labels,
    )
    if not keep_labels:
        output.warn(kube_labels.settle(kubectl, source, fresh, kube.namespace_of(kubectl, fresh)))
    if dry_run:
        output.emit_json(fresh)
        return
    if not any_node:
        kube.place(kubectl, fresh, wanted)
    made = kube.create(kubectl, fresh)
    if as_json:
        output.emit_json(made)
    else:
        click.echo(f"created pod {made['metadata']['namespace']}/{made['metadata']['name']} from {pinned}")


@cli.command()
@_cluster
@output.json_option
def doctor(as_json: bool, **rest: Any) -> None:
    """Check what checkpoints need: permissions, nodes, feature gate, runtimes, RuntimeClass, agents."""
    from cryoci.uses import kube_doctor

    findings = kube_doctor.examine(_kubectl(rest))
    if as_json:
        output.emit_json(findings)
    else:
        rows = [
            (finding.what, "ok" if finding.ok else "NO", finding.detail, finding.hint)
            for finding in findings
        ]
        output.table(("WHAT", "", "FOUND", "TO DO"), rows)
    raise click.exceptions.Exit(0 if all(finding.ok for finding in findings) else 1)


def main() -> None:
    """Entry point of kubectl-cryoci."""
    program.report(cli)


if __name__ == "__main__":
    main()
