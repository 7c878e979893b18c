# SPDX-License-Identifier: Apache-2.0
"""Run the real runtime as a child that looks, from both sides, as if it had been exec'd.

The child has this process' open files, directory, signal mask and environment; it gets the signals
that this process gets, dies when this process dies, and its exit status becomes ours. The container's
init that a detached restore leaves behind goes to the engine's subreaper (conmon, the containerd
shim): this process is none, but for the time of a dump or restore (`orphans`).
"""

import _signal  # type: ignore[import-not-found]  # `signal` loads enum and re: 5 ms
import posix

from cryoci.shim import underlying

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80
_PERIOD = 0.25  # seconds between looks
# Faults of this process, and the stops that a terminal sends to the whole group, keep their meaning.
_KEEP = (
    _signal.SIGSEGV,
    _signal.SIGBUS,
    _signal.SIGFPE,
    _signal.SIGILL,
    _signal.SIGTSTP,
    _signal.SIGTTIN,
    _signal.SIGTTOU,
)


def run(
    path: str,
    argv: list[str],
    extra: dict[bytes, bytes] | None = None,
    *,
    tied: bool = True,
    look: "Callable[[int], bool] | None" = None,
) -> int:
    """Run `path` with `argv` and the variables `extra` on top; returns its exit status, 128+N for signal N.

    When this process is killed the child is killed too if `tied`. `look` is called with the child's pid a few times
    a second, until it returns False. Raises UnsupportedError when runtimes call each other in a circle.
    """
    variables = {**underlying.child_environment(), **(extra or {})}
    die_with_parent = _parent_death_signal() if tied else None
    watched = _signal.valid_signals() - set(_KEEP)
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, watched)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)  # ignored, children would vanish unseen
    parent = posix.getpid()
    pid = posix.fork()
    if pid == 0:
        try:
            if die_with_parent:
                die_with_parent()
                if posix.getppid() != parent:
                    posix._exit(128 + int(_signal.SIGKILL))
            underlying.reset_signals()
            _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
            posix.execve(path, [path, *argv[1:]], variables)
        except OSError as e:
            posix.write(2, f"cryoci-runtime: cannot run {path}: {e.strerror}\n".encode())
        finally:
            posix._exit(127)
    while True:
        info = _signal.sigtimedwait(watched, _PERIOD) if look else _signal.sigwaitinfo(watched)
        if info is None:
            look = look if look and look(pid) else None
        elif info.si_signo == _signal.SIGCHLD:
            done, status = posix.waitpid(pid, posix.WNOHANG)
            if done:
                _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
                return (
                    128 + posix.WTERMSIG(status) if posix.WIFSIGNALED(status) else posix.WEXITSTATUS(status)
                )
        elif info.si_code != _SI_KERNEL:  # a key at the terminal reached the child as well
            try:
                posix.kill(pid, info.si_signo)
            except OSError:
                pass


def _parent_death_signal() -> "Callable[[], int]":
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: int(prctl(_PR_SET_PDEATHSIG, int(_signal.SIGKILL), 0, 0, 0))
