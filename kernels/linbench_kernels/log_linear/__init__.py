"""Log-linear attention: a scalar decay, and a weight for every level of a Fenwick tree of the past."""

from linbench_kernels.log_linear.operator import attention, step

__all__ = ["attention", "step"]
