"""The time mixing of RWKV-4: averages of the past whose weights fade, one per channel."""

from linbench_kernels.wkv.operator import scan, step

__all__ = ["scan", "step"]
