"""The delta rule on a state that fades at a rate of its own for every token and channel of the keys."""

from linbench_kernels.channel_delta.operator import attention, step

__all__ = ["attention", "step"]
