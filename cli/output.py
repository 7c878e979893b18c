# SPDX-License-Identifier: Apache-2.0
"""What verbs print: results to stdout as text, table or JSON; progress to stderr, and only to a terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from cryoci.amounts import printable as printable
from cryoci.amounts import rate as rate
from cryoci.amounts import seconds as seconds
from cryoci.amounts import size as size

if TYPE_CHECKING:
    from cryoci.ociimage.progress import Progress, Work
    from cryoci.ociimage.transport import RegistryOptions
    from cryoci.ociimage.trust.policy import Verdict

F = TypeVar("F", bound=Callable[..., Any])


def warn(messages: Sequence[str]) -> None:
    """What did not go well, and was no reason to fail, on stderr."""
    for message in messages:
        click.echo(f"cryoci: warning: {printable(message)}", err=True)


def complain(message: str) -> None:
    """One warning, on stderr."""
    warn([message])


def note(message: str) -> None:
    """A line about what goes on, on stderr."""
    click.echo(printable(message), err=True)


def emit_json(value: Any) -> None:
    """`value` (dataclasses, paths and all) as indented JSON on stdout."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, (tuple, set, frozenset)) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: of full width when piped, so that no script ever gets a shortened digest."""
    from rich.console import Console

    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=10_000, highlight=False)
    console.print(_grid(columns, rows))


@contextmanager
def live() -> Iterator[Callable[[Sequence[str], Sequence[Sequence[str]]], None]]:
    """A table on the terminal that is drawn anew; yields what draws it. Ctrl-C ends the block quietly."""
    from rich.live import Live

    with Live(auto_refresh=False, screen=True) as screen:
        try:
            yield lambda columns, rows: screen.update(_grid(columns, rows), refresh=True)
        except KeyboardInterrupt:
            pass


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for column in columns:
        grid.add_column(column, no_wrap=not sys.stdout.isatty(), overflow="fold")
    for row in rows:
        # names come out of images: no markup, no control characters may reach the terminal
        grid.add_row(*(Text(printable(cell)) for cell in row))
    return grid


def pairs(items: Sequence[tuple[str, str]]) -> None:
    """Aligned "name: value" lines on stdout; empty values are left out."""
    shown = [(name, value) for name, value in items if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{name + ':':<{width + 2}}{printable(value)}")


def parked(done: Any, *, as_json: bool, quiet: bool) -> None:
    """What `cryoci park` or `unpark` did."""
    warn(done.warnings)
    if as_json:
        emit_json(done)
    elif not quiet:
        steps = ", ".join(f"{name} {seconds(t)}" for name, t in done.seconds.items())
        held = f", {size(done.vram)} of GPU memory" if done.vram else ""
        click.echo(f"{done.container} is {done.state}{held}" + (f": {steps}" if steps else ""))


def printable_lines(text: str) -> str:
    """`printable` line by line."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


@contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """Bars with bytes, rate and time left, on stderr when it is a terminal and `quiet` is not asked for.

    They touch the terminal only while something moves: programs that cryoci runs may write to it too.
    """
    where = None if quiet else terminal()  # of now: a restore may give its container another stderr
    if where is None:
        yield None
        return
    with where, _bars(where) as made:
        yield made


def terminal() -> IO[str] | None:
    """The terminal that stderr is now, whatever becomes of stderr; None when it is none."""
    return os.fdopen(os.dup(sys.stderr.fileno()), "w") if sys.stderr.isatty() else None


def work(say: Callable[[str], None], where: IO[str] | None) -> Work:
    """What a daemon tells of each piece of its work: bars on the terminal `where`, else a line now and then."""
    from cryoci.ociimage.progress import lines

    return lines(say) if where is None else lambda name: _bars(where, name)


def part(progress: Progress | None) -> Work:
    """Pieces of work that are told by bars which are there already, if any are."""
    from cryoci.ociimage.progress import silent

    return (lambda name: nullcontext(progress.named(name))) if isinstance(progress, _Bars) else silent


@contextmanager
def _bars(terminal: IO[str], work: str = "") -> Iterator[Progress]:
    from rich import progress as rich
    from rich.console import Console

    bars = rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        console=Console(file=terminal, force_terminal=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else its lines are for a file
    )
    try:
        yield _Bars(bars, work, threading.Lock())
    finally:
        bars.stop()


class _Bars:
    """Progress as rich's bars."""

    def __init__(self, bars: Any, work: str, lock: threading.Lock) -> None:
        self._bars, self._work, self._lock = bars, work, lock

    def named(self, work: str) -> _Bars:
        """The same bars, whose names begin with `work`."""
        return _Bars(self._bars, work, self._lock)

    def start(self, name: str, total: int | None) -> object:
        with self._lock:
            self._bars.start()
            return self._bars.add_task(printable(f"{self._work} {name}".strip()), total=total)

    def advance(self, token: object, n: int) -> None:
        self._bars.advance(token, n)

    def done(self, token: object) -> None:
        with self._lock:
            self._bars.remove_task(token)
            if not self._bars.tasks:
                self._bars.stop()


def registry_options(command: F) -> F:
    """The options by which a verb reaches registries; `options` turns their values into RegistryOptions."""
    for option in (
        click.option(
            "--authfile", type=click.Path(path_type=Path), help="Read credentials from this file only."
        ),
        click.option(
            "--ca-file", type=click.Path(path_type=Path), help="Trust this CA (PEM) for the registry."
        ),
        click.option("--tls-verify/--no-tls-verify", default=True, help="Check the registry's certificate."),
        click.option(
            "--plain-http/--tls",
            default=None,
            help="Speak plain HTTP, or TLS, with the registry. Default: plain for loopback and for those "
            "that registries.conf marks insecure.",
        ),
    ):
        command = option(command)
    return command


def options(
    plain_http: bool | None, tls_verify: bool, ca_file: Path | None, authfile: Path | None
) -> RegistryOptions:
    """RegistryOptions of the values that `registry_options` parsed."""
    from cryoci.ociimage.transport import RegistryOptions

    return RegistryOptions(plain_http, tls_verify, ca_file, authfile)


metrics_option = click.option(
    "--metrics", metavar="ADDRESS:PORT", help="Serve numbers for Prometheus at http://ADDRESS:PORT/metrics."
)
backend_option = click.option(
    "--backend",
    type=click.Choice(["cryoci", "buildah"]),
    default="cryoci",
    show_default=True,
    help="Who makes the image: cryoci in one pass, or buildah through containers-storage.",
)


def verdict(found: Verdict | None) -> None:
    """What the policy has against an image that is used all the same, on stderr."""
    if found is not None and found.warning:
        click.echo(f"cryoci: warning: {found.warning}", err=True)


quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Print only the digest or path, and no progress."
)
timeline_option = click.option(
    "--timeline",
    metavar="FILE",
    help="Write where seconds and bytes went: FILE.json, or FILE.html or FILE.png to look at.",
)
report_option = click.option(
    "--report",
    metavar="FILE.html",
    help="Write a page about it: times, sizes, processes, memory map, GPUs, warnings; also when it fails.",
)
page_option = click.option(
    "--report", "page", metavar="FILE.html", help="Write it to a page: sizes, processes, memory map, GPUs."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
