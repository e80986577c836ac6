"""Attention with feature maps that are wider than a row or need more than it: features are made where they are used."""

from linbench_kernels.features.operator import State, attention, step

__all__ = ["State", "attention", "step"]
