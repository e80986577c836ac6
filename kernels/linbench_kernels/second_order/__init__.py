"""Attention by the Taylor polynomial of exp of order two, normalised; its features are never written."""

from linbench_kernels.second_order.operator import attention, step

__all__ = ["attention", "step"]
