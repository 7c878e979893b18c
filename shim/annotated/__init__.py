# SPDX-License-Identifier: Apache-2.0
"""`create` that restores: the container's annotations name a checkpoint, and `start` lets it run on."""
