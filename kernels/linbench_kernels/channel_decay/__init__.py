"""Attention whose state fades at a rate of its own for every token and channel of the keys, with or without a bonus."""

from linbench_kernels.channel_decay.operator import attention, step

__all__ = ["attention", "step"]
