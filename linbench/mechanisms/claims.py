"""What a mechanism says of itself that a test can refute. ``linbench check`` tries to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from linbench.cell import Scalar


@dataclass(frozen=True)
class ExactLimit:
    """Settings at which an approximator gives its target itself."""

    hyperparameters: Mapping[str, Scalar] = field(default_factory=dict)
    extras: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    """Turns drawn extras into those of the limit (gates opened, say)."""
    tolerance: float = 1e-10
    """Relative error that is left in fp64."""


@dataclass(frozen=True)
class Convergence:
    """A hyperparameter along which the error against the target falls, and inputs on which it does."""

    hyperparameter: str
    values: tuple[Scalar, ...]
    """From coarse to fine; the mean error over seeds must fall at every one of them."""
    length: int = 256
    inputs: str = "gaussian"
    inputs_parameters: Mapping[str, Scalar] = field(default_factory=dict)
    hyperparameters: Mapping[str, Scalar] = field(default_factory=dict)
    """The others, where they are not the defaults."""


@dataclass(frozen=True)
class Claims:
    """Refutable properties beyond those that every mechanism has (forms agree, gradients, determinism, …)."""

    row_stochastic: bool = False
    """The rows of the implied attention matrix sum to one: constant values come back unchanged."""
    linear_in_values: bool = True
    """o is linear in v, so that there is an implied attention matrix."""
    causality: Literal["strict", "values", "rounding"] = "strict"
    """``strict``: no future token changes a bit. ``values``: future keys may change which past keys are seen, but no
    future value ever enters. ``rounding``: a transform over all tokens (FFT) lets rounding errors of the future in."""
    permutation_equivariant: bool = False
    """Without a mask: tokens carry no position, so permuting all of them permutes the output."""
    duplication_invariant: bool = False
    """Without a mask: giving every key and value twice (a mesh refined by duplication) changes nothing."""
    converges: Convergence | None = None
