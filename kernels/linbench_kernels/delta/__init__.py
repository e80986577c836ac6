"""Attention with the delta rule: the value that the state holds for a key is replaced; no decay, or one per token."""

from linbench_kernels.delta.operator import attention, step

__all__ = ["attention", "step"]
