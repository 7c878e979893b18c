# SPDX-License-Identifier: Apache-2.0
"""`cryoci`: the command line. Each verb is a module that is imported when it is used."""

from __future__ import annotations

import errno
import importlib
import os
import sys

import click

from cryoci import __version__
from cryoci.errors import CryociError

# verb -> one line of help, so that `cryoci --help` imports no verb
VERBS = {
    "checkpoint": "Checkpoint a running container into a directory, layout or registry.",
    "restore": "Restore a checkpoint as a running container on this node.",
    "park": "Free a container's GPUs: its GPU memory goes to host memory, and it is frozen.",
    "unpark": "Bring a parked container back to its GPUs.",
    "ps": "List running and parked containers with what they hold on GPUs.",
    "repair": "Bring back a container that a killed cryoci has left half way.",
    "push": "Send a checkpoint to a registry or layout.",
    "pull": "Fetch a checkpoint image, every byte verified.",
    "list": "List checkpoint images of the local store, a layout or a registry.",
    "inspect": "Show what a checkpoint image holds, without fetching its memory.",
    "flatten": "Make a thin checkpoint directory independent of its parents.",
    "materialize": "Make a checkpoint directory whole for CRIU alone.",
    "bake": "Start a container, wait until it is ready, and make a checkpoint image of it.",
    "warm": "Fetch images and their base images, so that a restore needs no registry.",
    "swap": "Park one container and unpark another.",
    "share": "Let containers take turns on a GPU: requests bring in who is parked.",
    "idle": "Park containers that nobody uses, and bring them back on demand.",
    "top": "Watch containers, what they hold, and their checkpoints.",
    "guard": "Checkpoint a container at intervals, and restore it after a crash.",
    "agent": "Push the checkpoints that this node's kubelet makes.",
    "sign": "Sign a checkpoint image, as cosign does.",
    "verify": "Show who signed a checkpoint image.",
    "keygen": "Make a key pair for signing, or for encryption.",
    "cdi": "Show or describe the devices that containers of this node can get.",
    "rm": "Remove checkpoint images and free their space.",
    "install": "Tell this node's engines about cryoci-runtime.",
    "uninstall": "Undo cryoci install, to the byte.",
    "status": "Show which engines know cryoci-runtime.",
    "doctor": "Say what keeps checkpoints from working here.",
    "debug": "Pack what is known of a failed attempt into one file.",
    "explain": "Say why a dump or restore failed, from its log.",
    "ls": "List checkpoint images, or the archives of a directory.",
    "show": "Show checkpoints, a line each.",
    "diff": "Show what changed between two checkpoints.",
    "memory": "Look into the memory of a checkpoint.",
    "copy": "Copy an image as it is.",
    "tag": "Give an image another name, or pin it.",
    "save": "Write an image to one file.",
    "load": "Take images out of a file.",
    "gc": "Remove old checkpoint images by a policy.",
    "convert": "Turn one engine's checkpoint into another's.",
}
INTERNAL = ("fetch",)  # called by cryoci-runtime

_FULL = "make room there, or set TMPDIR or CRYOCI_STORE to a place on a larger file system"


class Verbs(click.Group):
    """A group whose commands are modules of this package, loaded on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS and name not in INTERNAL:
            return None
        command = importlib.import_module(f"cryoci.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="cryoci")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Show each program that is run, its status and duration, on stderr.",
)
def cli(verbose: bool) -> None:
    """Checkpoint containers, GPUs included, and restore them on any node.

    \b
    REF is one of
      NAME[:TAG]             an image in the local store (/var/lib/cryoci/images, or $CRYOCI_STORE)
      HOST/REPO[:TAG]        an image in a registry; @sha256:DIGEST pins it
      oci:LAYOUT:TAG         an image in an OCI layout directory
      ./DIR or /DIR          a checkpoint directory
      FILE.tar[.gz|.zst]     an archive that podman, CRI-O or containerd exported

    \b
    Examples:
      cryoci checkpoint web -o registry.example:5000/checkpoints/web:1
      cryoci restore registry.example:5000/checkpoints/web:1 --detach
    """
    if verbose:
        from cryoci import trace

        trace.verbose = True


def main() -> None:
    """Entry point of cryoci."""
    report(cli)


def report(command: click.Command) -> None:
    """Run a command line; a CryociError becomes one message, its hint and its exit status."""
    try:
        status = command.main(standalone_mode=False)
        if isinstance(status, int):  # click returns what ctx.exit was given
            sys.exit(status)
    except CryociError as e:
        click.echo(f"cryoci: {e.message}", err=True)
        if hint := e.hint or e.advice:
            click.echo(f"hint: {hint}", err=True)
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("cryoci: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except OSError as e:
        click.echo(f"cryoci: {e.strerror}: {e.filename}" if e.filename else f"cryoci: {e}", err=True)
        click.echo(f"hint: {_hint(e)}", err=True)
        sys.exit(1)


def _hint(e: OSError) -> str:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return _FULL
    if e.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return "use sudo: containers, and what cryoci keeps of them, are root's"
    return "see who owns that file, and its file system"


if __name__ == "__main__":
    main()
