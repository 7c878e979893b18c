# SPDX-License-Identifier: Apache-2.0
"""Uses: what people do with checkpoints, made of `shim` (containers) and `ociimage` (images)."""
