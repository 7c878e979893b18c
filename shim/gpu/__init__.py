# SPDX-License-Identifier: Apache-2.0
"""GPUs in and out of a checkpoint: NVIDIA's by the CUDA driver API, AMD's by CRIU's plugin."""
