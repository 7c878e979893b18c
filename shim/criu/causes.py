# SPDX-License-Identifier: Apache-2.0
"""The catalogue of failures, in the order in which its rows are tried.

`source` of a row is the issue (OWNER/REPO#N) or CRIU's source file (4.2) that prints the text; docs/doctor.md is the
table. GPUs come first: one that was not checkpointed shows up in CRIU's own rows as an unknown mapping or device.
"""

from __future__ import annotations

from cryoci.shim.criu.causes_files import FILES
from cryoci.shim.criu.causes_gpu import GPU
from cryoci.shim.criu.causes_node import NODE
from cryoci.shim.criu.causes_processes import PROCESSES
from cryoci.shim.criu.known import Known

CAUSES: tuple[Known, ...] = (*GPU, *NODE, *FILES, *PROCESSES)
