# SPDX-License-Identifier: Apache-2.0
"""Command lines of runc and crun: what is a flag, what is its value, which word is the verb.

The tables hold the flags of runc 1.1 to 1.3 and crun 1.2x, read from their sources and checked in the
tests against the installed programs. One line is parsed with the union of both, because the verb and
the container id must be known before the underlying runtime is. The two differ in style:

- runc (urfave/cli v1, Go `flag`): `-opt` is `--opt`, `-b=X`, no bundles; flags may follow the id (the
  library moves them in front), except for `exec` and `ps`; a flag always takes the next word as value.
- crun (GNU argp, in order): bundles (`-db DIR`, `-bDIR`), unique prefixes (`--bund DIR`), and the first
  word that is no flag ends the flags.

This module is on the path of every call of the runtime: it imports nothing.
"""

# A word is NAME or LETTER/NAME; "=" takes a value; "=?" takes only an attached one; "@" is the first
# version that knows the flag.
_GLOBALS = {
    "runc": "debug log= log-format= root= criu= systemd-cgroup rootless= h/help v/version",
    "crun": "debug log= log-format= log-level= root= rootless= cgroup-manager= systemd-cgroup"
    " ?/help usage v/version V/version",
}
_RUN = "b/bundle= console-socket= pid-file= no-pivot no-new-keyring preserve-fds="
_LIMITS = (
    " r/resources= blkio-weight= cpu-period= cpu-quota= cpu-share= cpu-rt-period= cpu-rt-runtime="
    " cpuset-cpus= cpuset-mems= kernel-memory= kernel-memory-tcp= memory= memory-reservation= memory-swap="
    " pids-limit= l3-cache-schema= mem-bw-schema="
)
_EXEC = (
    "console-socket= cwd= e/env= u/user= p/process= d/detach pid-file= process-label= apparmor= no-new-privs"
    " c/cap= preserve-fds= cgroup="
)
_RUNC = {
    "checkpoint": "image-path= work-path= parent-path= leave-running tcp-established tcp-skip-in-flight@1.3"
    " link-remap@1.3 ext-unix-sk shell-job lazy-pages status-fd= page-server= file-locks pre-dump"
    " manage-cgroups-mode= empty-ns= auto-dedup",
    "create": _RUN + " pidfd-socket=@1.2",
    "delete": "f/force",
    "events": "interval= stats",
    "exec": _EXEC + " t/tty g/additional-gids= ignore-paused pidfd-socket=@1.2",
    "features": "",
    "kill": "a/all",
    "list": "f/format= q/quiet",
    "pause": "",
    "ps": "f/format=",
    "restore": "console-socket= image-path= work-path= tcp-established ext-unix-sk shell-job file-locks"
    " manage-cgroups-mode= b/bundle= d/detach pid-file= no-subreaper no-pivot empty-ns= auto-dedup"
    " lazy-pages lsm-profile= lsm-mount-context=",
    "resume": "",
    "run": _RUN + " d/detach keep no-subreaper pidfd-socket=@1.2",
    "spec": "b/bundle= rootless",
    "start": "",
    "state": "",
    "update": "cpu-burst=@1.2 cpu-idle=@1.2" + _LIMITS,
}
_CRUN = {
    "checkpoint": "image-path= work-path= leave-running tcp-established ext-unix-sk shell-job file-locks"
    " network-lock=@1.19 parent-path= pre-dump manage-cgroups-mode=",
    "create": _RUN + " f/config= no-subreaper",
    "delete": "f/force r/regex",
    "exec": _EXEC + " t/tty=?",
    "features": "",
    "kill": "a/all r/regex",
    "list": "f/format= q/quiet",
    "mounts": "",
    "pause": "",
    "ps": "f/format=",
    "restore": "b/bundle= image-path= work-path= tcp-established tcp-close@1.23 ext-unix-sk shell-job"
    " d/detach pid-file= console-socket= file-locks manage-cgroups-mode= network-lock=@1.19 lsm-profile="
    " lsm-mount-context=",
    "resume": "",
    "run": _RUN + " f/config= d/detach keep no-subreaper",
    "spec": "b/bundle= f/file= rootless",
    "start": "",
    "state": "",
    "update": _LIMITS,
}
# Flags of cryoci-runtime's own: they go to the per-container CRIU configuration. conmon passes
# --no-new-keyring to restore as well, which no runtime knows.
_CRIU = (
    " tcp-close ghost-limit= timeout= network-lock= external= libdir= log-level= link-remap skip-in-flight"
)
_OWN = {
    "checkpoint": _CRIU
    + " hold-memory criu-memory memory-parent= memory-returns memory-options= memory-sink=",
    "restore": _CRIU + " no-new-keyring",
}

VERBS = frozenset(_RUNC) | frozenset(_CRUN)
RUNTIMES = {"runc": (_GLOBALS["runc"], _RUNC), "crun": (_GLOBALS["crun"], _CRUN)}
_IN_ORDER = ("exec", "ps")  # runc sets SkipArgReorder on these

Flags = dict[str, tuple[str, str, tuple[int, ...]]]


def flags(words: str) -> tuple[Flags, dict[str, str]]:
    """Table of a flag list: name -> (name, "" | "=" | "=?", since), and letter -> name."""
    names: Flags = {}
    letters: dict[str, str] = {}
    for word in words.split():
        word, _, version = word.partition("@")
        since = tuple([int(n) for n in version.split(".")]) if version else ()
        letter, slash, name = word.partition("/")
        if not slash:
            letter, name = "", word
        name, equals, optional = name.partition("=")
        names[name] = (name, equals + optional, since)
        if letter:
            letters[letter] = name
    return names, letters


def knows(kind: str, version: tuple[int, ...], verb: str, name: str) -> bool:
    """Does runtime `kind` ("runc" or "crun") of `version` have flag `name` on `verb`?"""
    names, _ = flags(RUNTIMES[kind][1].get(verb, ""))
    return name in names and version >= names[name][2]


class Flag:
    """One flag on a command line: `width` words from `index`; `letter` is its place in a bundle or -1."""

    __slots__ = ("index", "letter", "name", "value", "width")

    def __init__(self, name: str, value: str | None, index: int, width: int, letter: int = -1) -> None:
        self.name = name
        self.value = value
        self.index = index
        self.width = width
        self.letter = letter


class Invocation:
    """A parsed command line of the runtime.

    `globals` and `options` map flag names to their last value (None for a switch). `args` are the
    positional words after the verb. `doubt` names what the tables cannot explain: an unknown flag or
    a missing value; only the real runtime can answer such a line.
    """

    __slots__ = ("args", "argv", "doubt", "found", "globals", "kind", "options", "verb", "verb_index")

    def __init__(self, argv: list[str], kind: str | None) -> None:
        self.argv = argv
        self.kind = kind
        self.globals: dict[str, str | None] = {}
        self.verb: str | None = None
        self.verb_index = -1
        self.options: dict[str, str | None] = {}
        self.found: list[Flag] = []
        self.args: list[str] = []
        self.doubt: str | None = None

    @property
    def id(self) -> str | None:
        """The container id: the first positional word."""
        return self.args[0] if self.args else None

    @property
    def root(self) -> str | None:
        """The value of `--root`, if any."""
        return self.globals.get("root")

    @property
    def asks_help(self) -> bool:
        """Is this a question about the program (help, usage, version) and no operation?"""
        return any(name in self.globals or name in self.options for name in ("help", "usage", "version"))

    def has(self, name: str) -> bool:
        """Is switch `name` of the verb on? (Go's flags accept `--name=false`.)"""
        return name in self.options and self.options[name] not in ("false", "0", "f", "F", "FALSE", "False")


def parse(argv: list[str], kind: str | None = None) -> Invocation:
    """Parse a command line (`argv[0]` is the program) in the style of `kind`; None: not known yet.

    Never raises: what cannot be understood sets `doubt`, and is for the real runtime to refuse.
    """
    line = Invocation(argv, kind)
    at = _globals(line)
    if at < len(argv) and line.doubt is None:
        line.verb = argv[at]
        line.verb_index = at
        if line.verb in VERBS:
            _options(line, at + 1)
    return line


def _globals(line: Invocation) -> int:
    names, letters = flags(_GLOBALS["runc"] + " " + _GLOBALS["crun"])
    argv = line.argv
    i = 1
    while i < len(argv) and line.doubt is None:
        word = argv[i]
        if word == "--":
            return i + 1
        if word == "-" or word[:1] != "-":
            return i
        i += _flag(line, i, names, letters, line.globals, None)
    return i


def _options(line: Invocation, i: int) -> None:
    argv, verb = line.argv, line.verb or ""
    both = (
        _RUNC.get(verb, "") + " " + _CRUN.get(verb, "") + " " + _OWN.get(verb, "") + " h/help ?/help usage"
    )
    if verb == "exec" and line.kind == "runc":
        both += " t/tty"
    names, letters = flags(both)
    permutes = line.kind == "runc" and verb not in _IN_ORDER
    after_switch = False
    while i < len(argv):
        word = argv[i]
        if word == "--":
            line.args += argv[i + 1 :]
            return
        if word == "-" or word[:1] != "-":
            # Without its own knowledge of values urfave/cli keeps the word behind a switch in place, and
            # Go's parser then stops there.
            if not permutes or after_switch:
                line.args += argv[i:]
                return
            line.args.append(word)
            i += 1
            continue
        width = _flag(line, i, names, letters, line.options, line.found)
        after_switch = width == 1 and "=" not in word
        i += width


def _flag(
    line: Invocation,
    i: int,
    names: Flags,
    letters: dict[str, str],
    values: dict[str, str | None],
    found: list[Flag] | None,
) -> int:
    """Take the flag at word `i`; return how many words it spans."""
    argv, kind = line.argv, line.kind
    word = argv[i]
    long = word[:2] == "--"
    name, equals, attached = word[2 if long else 1 :].partition("=")
    if not long:
        as_go = kind == "runc" or (kind is None and (name in names or name in letters))
        if not as_go and _is_bundle(word[1:], names, letters):
            return _bundle(line, i, names, letters, values, found)
        if kind != "crun":
            name = letters.get(name, name)
    elif name not in names and kind != "runc":
        longer = [n for n in names if n.startswith(name)]
        if len(longer) == 1:
            name = longer[0]
    if name not in names or (equals and kind == "crun" and not names[name][1]):
        line.doubt = line.doubt or f"unknown flag {word}"
        return 1
    takes = names[name][1]
    width = 1
    value: str | None = None
    if equals:
        value = attached
    elif takes == "=":
        if i + 1 >= len(argv):
            line.doubt = line.doubt or f"flag {word} needs an argument"
            return 1
        value = argv[i + 1]
        width = 2
    values[name] = value
    if found is not None:
        found.append(Flag(name, value, i, width))
    return width


def _is_bundle(body: str, names: Flags, letters: dict[str, str]) -> bool:
    for letter in body:
        if letter not in letters:
            return False
        if names[letters[letter]][1]:
            return True
    return True


def _bundle(
    line: Invocation,
    i: int,
    names: Flags,
    letters: dict[str, str],
    values: dict[str, str | None],
    found: list[Flag] | None,
) -> int:
    body = line.argv[i][1:]
    for place, letter in enumerate(body, 1):
        name = letters[letter]
        value: str | None = None
        width = 1
        takes = names[name][1]
        if takes:
            value = body[place:] or None
            if value is None and takes == "=":
                if i + 1 >= len(line.argv):
                    line.doubt = line.doubt or f"flag -{letter} needs an argument"
                    return 1
                value = line.argv[i + 1]
                width = 2
        values[name] = value
        if found is not None:
            found.append(Flag(name, value, i, width, place))
        if takes:
            return width
    return 1


def without(line: Invocation, *names: str) -> list[str]:
    """The command line less every occurrence of the verb's flags `names`, values and bundles included."""
    argv: list[str | None] = list(line.argv)
    for flag in reversed(line.found):  # from the end, so that places in a bundle stay valid
        if flag.name not in names:
            continue
        word = argv[flag.index]
        if flag.letter < 0 or word is None:
            argv[flag.index] = None
        else:
            attached = flag.value is not None and flag.width == 1
            rest = "" if attached else word[flag.letter + 1 :]
            argv[flag.index] = (word[: flag.letter] + rest) if flag.letter > 1 or rest else None
        if flag.width == 2:
            argv[flag.index + 1] = None
    return [word for word in argv if word is not None]


def with_flag(line: Invocation, name: str, value: str | None = None) -> list[str]:
    """The command line with the verb's flag `name` set once, right behind the verb.

    The value is a word of its own: crun has flags (--network-lock) that refuse an attached one.
    """
    argv = without(line, name)
    at = line.verb_index + 1
    return argv[:at] + ([f"--{name}"] if value is None else [f"--{name}", value]) + argv[at:]
