"""Exact softmax attention over all keys, causal or not, with as many queries as keys or not."""

from linbench_kernels.exact.operator import attention

__all__ = ["attention"]
