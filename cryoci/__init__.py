# SPDX-License-Identifier: Apache-2.0
"""cryoci: checkpoint/restore of GPU and CPU containers at the OCI runtime seam.

The rooms (shim, ociimage, hooks, cli) are links to the top-level folders of the source tree.
This package itself holds only the primitives that every room may import.
"""

__version__ = "0.1.0"
