"""Fused Triton kernels for attention mechanisms. Imports torch and triton, and nothing of linbench.

One folder for every family of mechanisms, one kernel a file; ``README.md`` beside this package has the letters.
"""
