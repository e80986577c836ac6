"""Attention without a mask by features: sums over keys in one pass, their reading by queries in another."""

from linbench_kernels.noncausal.operator import pool, read

__all__ = ["pool", "read"]
