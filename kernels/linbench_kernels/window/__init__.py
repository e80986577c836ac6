"""Exact softmax attention to a window of keys, alone or sharing its normaliser with attention to other keys."""

from linbench_kernels.window.operator import attention, step

__all__ = ["attention", "step"]
