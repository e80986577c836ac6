"""The selective state space S6: a decay for every number of the state and every token."""

from linbench_kernels.selective_scan.operator import scan, step

__all__ = ["scan", "step"]
