# SPDX-License-Identifier: Apache-2.0
"""Sealed images: layers that only the holders of a key can read. Order: compress, encrypt, sign."""
