"""Attention with an additive state: no decay, one per head or one per token and head, with or without a normaliser."""

from linbench_kernels.additive.launch import configuration
from linbench_kernels.additive.operator import attention, step

__all__ = ["attention", "configuration", "step"]
