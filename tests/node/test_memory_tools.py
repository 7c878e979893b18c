# SPDX-License-Identifier: Apache-2.0
"""A materialized checkpoint in the hands of others: CRIU's crit and Red Hat's checkpointctl read all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.node.test_incremental import MIB, Changing
from tests.nodes import crit, workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

# The bytes that CRIU's images have where the chunk files of another checkpoint have theirs.
COMPARE = """
import json, sys
from cryoci.shim.memory import chain, chunk, index
whole, pages, entries = sys.argv[1], open(sys.argv[2], "rb"), json.load(sys.stdin)
held = {}
at = 0
for entry in entries[1:]:
    start = int(entry["vaddr"], 16) if isinstance(entry["vaddr"], str) else entry["vaddr"]
    for page in range(int(entry["nr_pages"])):
        held[start + page * 4096] = at
        at += 4096
pages.seek(0, 2)
assert pages.tell() == at, (pages.tell(), at)
content, buffer, compared = index.read(whole), chunk.Buffer(), 0
with chain.Places(content, whole) as places:
    for key, digest in content.chunks:
        with chunk.Reader(places.of(key), key, digest) as reader:
            for runs, _ in reader.pieces(buffer):
                offset = 0
                for first, size in runs:
                    for page in range(first, first + size, 4096):
                        pages.seek(held[page])
                        assert pages.read(4096) == bytes(buffer.view[offset : offset + 4096]), hex(page)
                        offset += 4096
                        compared += 4096
print(compared)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[NamespaceNode]:
    with Cluster(tag="tools") as cluster:
        yield cluster.start("a", shown=crit.shown())


def test_crit_and_checkpointctl_read_a_materialized_checkpoint(node: NamespaceNode) -> None:
    subject = Changing(node, "runc", 3)
    subject.change()
    node.sh("mkdir /srv/tools")
    subject.checkpoint("/srv/tools/before", "-R")
    told = subject.change(1)
    subject.checkpoint("/srv/tools/thin", "-R", "--incremental", "--thin")
    images = "/srv/tools/thin/checkpoint"
    node.sh("cp -a /srv/tools/thin /srv/tools/whole")
    node.run(["cryoci", "flatten", "/srv/tools/whole"])
    node.run(["cryoci", "materialize", "/srv/tools/thin"])

    pagemap = crit.decoded(node, f"{images}/pagemap-1.img")
    argv = ["/opt/cryoci/bin/python", "-c", COMPARE, "/srv/tools/whole/checkpoint", f"{images}/pages-1.img"]
    assert int(node.run(argv, input=json.dumps(pagemap).encode()).stdout) > 24 * MIB
    assert crit.decoded(node, f"{images}/core-1.img")[0]["tc"]["task_state"] in (1, "TASK_ALIVE")
    assert not any(
        "memory of cryoci" in str(entry) for entry in crit.decoded(node, f"{images}/inventory.img")
    )
    assert crit.decoded(node, f"{images}/files.img")
    assert "python3" in crit.crit(node, "x", images, "ps")
    assert "/usr/bin/python3" in crit.crit(node, "x", images, "mems")

    node.run(["tar", "-C", "/srv/tools/thin", "-cf", "/srv/tools/thin.tar", "."])
    asked = node.run(["checkpointctl", "inspect", "/srv/tools/thin.tar", "--all", "--format=json"]).stdout
    assert json.loads(asked)[0]["process_tree"]["command"].startswith("python3")
    sizes = node.run(["checkpointctl", "memparse", "/srv/tools/thin.tar"]).stdout.decode()
    row = next(line for line in sizes.splitlines() if "python3" in line)
    assert float(row.split("|")[3].split()[0]) > 24 and "MiB" in row, sizes
    argv = ["checkpointctl", "memparse", "--pid=1", "/srv/tools/thin.tar"]
    assert "|" in node.run(argv).stdout.decode()

    subject.end()  # and plain runc restores it
    argv = ["runc", "restore", "-d", "-b", subject.base, "--image-path", images, subject.name]
    workload.detach(node, argv, f"{subject.base}/log")
    assert subject.change() == told
    subject.remove()
