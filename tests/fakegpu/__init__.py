# SPDX-License-Identifier: Apache-2.0
"""A GPU for machines without one: the driver's library, made for tests and installed nowhere else."""
