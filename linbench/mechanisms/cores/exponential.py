"""e^x of many numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp_(x: Tensor) -> Tensor:
    """``x`` ← e^x in place, and ``x`` itself.

    In fp32 on a CPU as 2^(x log₂ e): there torch takes e^x from MKL, which on processors of AMD needs 2.7 times as long
    as what it takes 2^x from. The relative error grows to 1.25 |x| 2⁻²⁴ by the rounding of log₂ e and of the product:
    about what half a unit in the last place of x changes. Where the exponential of a large |x| has to keep its digits,
    ``x.exp_()`` does.
    """
    return exp(x, out=x)


def exp(x: Tensor, *, out: Tensor) -> Tensor:
    """:func:`exp_` of ``x``, which stays as it is, in ``out``."""
    if x.device.type == "cpu" and x.dtype is torch.float32:
        return torch.mul(x, LOG2_E, out=out).exp2_()
    return torch.exp(x, out=out)
