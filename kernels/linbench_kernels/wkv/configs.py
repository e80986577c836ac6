"""Channels, tokens and warps: one choice for every architecture, because a channel is three numbers and no product."""

from __future__ import annotations

from linbench_kernels.additive.configs import Config

INTERPRETED = Config(chunk=4, columns=64, warps=1, stages=1)
DEFAULT = Config(chunk=8, columns=32, warps=1, stages=1)
"""A thread has a channel, so that as many programs as can be walk side by side; ``chunk`` is the tokens that are loaded
at once, and those from one state that is kept for the backward to the next."""


def config(arch: str) -> Config:
    """The configuration of all kernels of the family."""
    return INTERPRETED if arch == "interpreter" else DEFAULT
