# SPDX-License-Identifier: Apache-2.0
"""Who vouches for a checkpoint image: keys, signatures as cosign writes them, provenance, and the policy."""
