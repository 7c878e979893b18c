# SPDX-License-Identifier: Apache-2.0
"""Random hostile checkpoints at every verb: 0 escapes, 0 hangs, 0 tracebacks are the only good result.

    nice .venv/bin/python -m bench.fuzz_archives [--cases 10000] [--seed N] [--json FILE]

Each case is an archive or image layout that hypothesis makes: members of odd names and kinds, headers that
lie, documents of random JSON, CRIU images with random fields, layouts with random manifests, or a good one
with bytes changed. It is given to a few verbs; tests/hostile says what must not happen. A case that
takes over SECONDS counts as a hang. Results: docs/benchmarks/fuzz.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cryoci.ociimage import annotations as families
from cryoci.ociimage import archive, manifest, tar
from tests import hostile
from tests.unit.criu_images import image, message

SECONDS = 20
GOOD = hostile.pack(hostile.members_of(hostile.whole()))

NAMES = st.one_of(
    st.sampled_from(sorted(archive.TOP_FILES)),
    st.sampled_from(
        [f"checkpoint/{n}" for n in ("core-1.img", "x.img", "pages-1.img", "parent", "..", ".")]
    ),
    st.sampled_from(
        ["../evil", "/etc/evil", "checkpoint", "volumes/a.tar", "a/../../b", "", ".", "./", "\x1b[31m"]
    ),
    st.lists(st.sampled_from(["..", ".", "", "checkpoint", "volumes", "a", "\n", "\u202e"]), max_size=5).map(
        "/".join
    ),
    st.text(max_size=40),
)
KINDS = st.sampled_from(
    [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"M", b"\0", b"Z"]
)
SIZES = st.one_of(st.integers(0, 2000), st.sampled_from([1 << 31, 1 << 33, 1 << 49, (1 << 80) - 1]))
RECORDS = st.dictionaries(
    st.sampled_from(["path", "linkpath", "size", "GNU__sparse__name", "SCHILY__xattr__user__x", "mtime"]),
    st.one_of(NAMES, SIZES.map(str)),
    max_size=3,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.sampled_from([*hostile.CONFIG, *hostile.SPEC, "version", "engine", "criu"]),
                st.text(max_size=8),
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=25,
)
FIELDS = st.dictionaries(
    st.integers(1, 20).map(lambda n: f"f{n}"),
    st.one_of(
        st.integers(0, 1 << 64),
        st.binary(max_size=30),
        st.lists(st.integers(0, 1 << 40), max_size=5),
        st.lists(st.binary(max_size=20), max_size=3),
        st.dictionaries(st.integers(1, 20).map(lambda n: f"f{n}"), st.integers(0, 1 << 64), max_size=5).map(
            lambda fields: message(**fields)
        ),
    ),
    max_size=8,
)
DOCUMENT_NAMES = st.sampled_from(
    [
        "config.dump",
        "spec.dump",
        "cryoci.json",
        "deleted.files",
        "network.status",
        "status.dump",
        "bind.mounts",
    ]
)
IMAGE_NAMES = st.sampled_from(
    [
        "pstree",
        "core-1",
        "mm-1",
        "pagemap-1",
        "files",
        "fdinfo-2",
        "fs-1",
        "ids-1",
        "mountpoints-1",
        "utsns-1",
    ]
)


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """The good archive with a few members after it that hardly any program writes."""
    parts = [GOOD.rstrip(b"\0") + bytes(-len(GOOD.rstrip(b"\0")) % 512)] if draw(st.booleans()) else [b""]
    for _ in range(draw(st.integers(1, 4))):
        if records := draw(RECORDS):
            parts.append(hostile.pax(**records))
        data = draw(st.binary(max_size=300))
        size = len(data) if draw(st.booleans()) else draw(SIZES)
        name, link = draw(NAMES).encode(errors="replace"), draw(NAMES).encode(errors="replace")
        parts.append(hostile.raw(draw(KINDS), name, size, link, data))
    return b"".join(parts) + (tar.END if draw(st.booleans()) else b"")


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A checkpoint whose descriptions are any JSON."""
    files = hostile.whole()
    for _ in range(draw(st.integers(1, 3))):
        value = draw(JSON)
        name = draw(DOCUMENT_NAMES)
        base = {"config.dump": hostile.CONFIG, "spec.dump": hostile.SPEC}.get(name)
        if base is not None and isinstance(value, dict):
            value = {**base, **value}
        files[name] = json.dumps(value).encode()
    return hostile.pack(hostile.members_of(files))


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """A checkpoint some of whose CRIU images hold any fields."""
    files = hostile.whole()
    for _ in range(draw(st.integers(1, 3))):
        name = draw(IMAGE_NAMES)
        messages = [message(**fields) for fields in draw(st.lists(FIELDS, max_size=4))]
        files[f"checkpoint/{name}.img"] = image(name.partition("-")[0], *messages)
    return hostile.pack(hostile.members_of(files))


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """The good archive, maybe compressed, with bytes changed, cut out or put in."""
    import gzip

    data = bytearray(draw(st.sampled_from([GOOD, gzip.compress(GOOD)])))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        junk = draw(st.binary(max_size=12))
        data[at : at + draw(st.sampled_from([0, len(junk), 512]))] = junk
    return bytes(data)


@st.composite
def layouts(draw: st.DrawFn) -> hostile.Change:
    """A change to the documents of a layout."""
    part = draw(st.sampled_from(["index", "manifest", "config", "layout", "layer", "entry"]))
    values = draw(
        st.dictionaries(
            st.sampled_from(
                [
                    "schemaVersion",
                    "mediaType",
                    "digest",
                    "size",
                    "layers",
                    "manifests",
                    "annotations",
                    "config",
                    "rootfs",
                ]
            ),
            st.one_of(
                JSON,
                st.sampled_from([manifest.INDEX, manifest.MANIFEST, hostile.D0, "sha256:../../x"]),
                st.dictionaries(
                    st.sampled_from([families.LAYER_KIND, families.LAYER_RAW_SIZE]), NAMES, max_size=2
                ),
            ),
            max_size=3,
        )
    )

    def change(found: dict[str, Any], blobs: dict[str, bytes]) -> None:
        if part == "layer":
            found["manifest"]["layers"][0].update(values)
        else:
            found.setdefault(part, {}).update(values)

    return change


CASES = st.one_of(
    st.tuples(st.just("tar"), tars()),
    st.tuples(st.just("documents"), documents()),
    st.tuples(st.just("images"), images()),
    st.tuples(st.just("changed"), changed()),
    st.tuples(st.just("layout"), layouts()),
)
CONVERSIONS = [verb for verb in hostile.VERBS if verb[0] == "convert"]
OTHERS = [verb for verb in hostile.VERBS if verb[0] not in ("convert", "pull")]


class Late(BaseException):
    """A case that has taken too long; not an Exception, so that nothing swallows it."""


def late(number: int, frame: FrameType | None) -> None:
    raise Late


def run(cases: int, number: int, report: Path) -> dict[str, Any]:
    """Run so many cases; returns the counts."""
    counts: collections.Counter[str] = collections.Counter()
    tally: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest = 0.0
    place = Path(tempfile.mkdtemp(prefix="cryoci-fuzz."))
    signal.signal(signal.SIGALRM, late)

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES, st.sampled_from(CONVERSIONS), st.sampled_from(OTHERS))
    def one(case: tuple[str, Any], conversion: tuple[str, ...], other: tuple[str, ...]) -> None:
        nonlocal slowest
        kind, made = case
        counts[kind] += 1
        sandbox = place / "sandbox"
        source = place / "in"
        for folder in (sandbox, source):
            folder.mkdir()
        verbs = (hostile.VERBS[0], other, conversion)
        began = time.monotonic()
        signal.alarm(SECONDS)
        try:
            if kind == "layout":
                try:
                    reference = hostile.layout_of(source / "layout", made)
                except (AttributeError, KeyError, TypeError, ValueError):
                    counts["unmakeable"] += 1
                    return
            else:
                reference = hostile.write("case", made, source)
            found = hostile.exercise(reference, sandbox, verbs, tally)
        except Late:
            found = [f"hang: over {SECONDS} s"]
        finally:
            signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
            for folder in (sandbox, source):
                shutil.rmtree(folder, ignore_errors=True)
        if found:
            wrong.append(f"{kind} {[verb[0] for verb in verbs]}: {found[:3]}")
            if kind != "layout":
                (report / f"fuzz-{hostile.digest(made)}").write_bytes(made)

    began = time.monotonic()
    try:
        with hostile.environment(place):
            one()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "cases": sum(counts[kind] for kind in ("tar", "documents", "images", "changed", "layout")),
        "kinds": dict(counts),
        "outcomes": dict(sorted(tally.items())),
        "wrong": wrong,
        "escapes": sum("outside" in w or "link" in w or "special" in w for w in wrong),
        "hangs": sum("hang" in w for w in wrong),
        "seconds": round(time.monotonic() - began, 1),
        "slowest case, seconds": round(slowest, 2),
        "peak RSS, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "python": platform.python_version(),
        "seed": number,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()), help="where bad cases are kept"
    )
    words = parser.parse_args()
    result = run(words.cases, words.seed, words.keep)
    text = json.dumps(result, indent=2)
    print(text)
    if words.json:
        words.json.write_text(text + "\n")
    sys.exit(1 if result["wrong"] else 0)


if __name__ == "__main__":
    main()
