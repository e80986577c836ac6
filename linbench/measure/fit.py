"""The ``fit`` measure: how near to exact softmax a mechanism comes once what a layer learns has been learned.

Protocol 2:

* *What is fitted.* The mechanism's own parameters, and what surrounds an operator in a layer: for every head an affine
  map of q, of k, of v and of the output, which start as identities, and an affine map from [q, k, v] of a token to each
  of its gates before their activation, which starts at zero.
* *On what.* Every step sees another draw of the cell's family of inputs, made from a seed that no other measure uses;
  a captured family gives another text, and the same again when all have been seen. The cell's own inputs are held out:
  they judge, before and after.
* *How.* Adam in fp32 on ‖output − truth‖² / ‖truth‖² with truth exact softmax attention, the learning rate falling to
  zero along a cosine, gradients clipped to norm 1. Everything is seeded by the cell.
* *When to stop.* Every 20 steps the loss is taken on one more draw, which is neither fitted nor judges; what is judged
  is the layer where that was least, which is the start if nothing helped.
* *Judged* by the protocol of :mod:`linbench.measure.error`, in the cell's dtype.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from linbench import inputs
from linbench.cell import Cell
from linbench.measure.call import Call
from linbench.measure.error import measure_error
from linbench.measure.exact import exact_attention
from linbench.mechanisms.base import Mechanism
from linbench.record import Error, Fit

PROTOCOL = 2
VALIDATION_STEPS = 20
"""Between two looks at the draw that selects the step."""
LARGEST_GRADIENT = 1.0


class Layer(torch.nn.Module):
    """A mechanism between the projections of a layer; at the start, the mechanism with its gates half-way open.

    Args:
        mechanism: with parameters of its own or without.
        extras: those of its extras that are no gates; they stay as they are.
    """

    def __init__(self, mechanism: Mechanism, extras: dict[str, Tensor]) -> None:
        super().__init__()
        geometry, self.mechanism = mechanism.geometry, mechanism
        self.gates, self.fixed = mechanism.gates(), extras
        widths = {"query": geometry.key_dim, "key": geometry.key_dim, "value": geometry.value_dim}
        widths["output"] = geometry.value_dim
        self.maps = torch.nn.ParameterDict(
            {name: torch.eye(width + 1, width).repeat(geometry.heads, 1, 1) for name, width in widths.items()}
        )
        read = 2 * geometry.key_dim + geometry.value_dim + 1
        self.gate_maps = torch.nn.ParameterDict(
            {name: torch.zeros(geometry.heads, read, gate.width or 1) for name, gate in self.gates.items()}
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[B, H, N, M]`` in the dtype of v."""
        mapped = (affine(x, self.maps[name]) for name, x in (("query", q), ("key", k), ("value", v)))
        seen = torch.cat((q, k, v), -1)
        extras = dict(self.fixed)
        for name, gate in self.gates.items():
            dtype = torch.promote_types(q.dtype, torch.float32) if gate.precise else q.dtype
            raw = affine(seen.to(dtype), self.gate_maps[name])
            extras[name] = gate.activation(raw if gate.width else raw.squeeze(-1)).to(dtype)
        return affine(self.mechanism(*mapped, **extras), self.maps["output"])


def affine(x: Tensor, weight: Tensor) -> Tensor:
    """``[x, 1] @ weight`` for every head: x ``[B, H, N, D]``, weight ``[H, D + 1, E]``."""
    weight = weight.to(x.dtype)
    return x @ weight[:, :-1] + weight[:, -1:]


def measure_fit(call: Call, output: Tensor, *, steps: int = 300, learning_rate: float = 0.01) -> Fit:
    """Fit on other draws of the cell's inputs, judge on the cell's own.

    Args:
        call: the cell with its inputs.
        output: not used; the layer's own output before fitting is judged instead.
        steps: of the optimiser, each on a draw of its own.
        learning_rate: at the start.
    """
    cell = call.cell
    q, k, v = (x.detach() for x in (call.q, call.k, call.v))
    layer = make_layer(call)
    before = _judge(layer, q, k, v, call)
    fitting = fit(layer, cell, q.device, steps=steps, learning_rate=learning_rate)
    after = _judge(layer, q, k, v, call)
    return Fit(
        protocol=PROTOCOL,
        steps=steps,
        learning_rate=learning_rate,
        parameters=sum(x.numel() for x in layer.parameters()),
        own_parameters=sum(x.numel() for x in layer.mechanism.parameters()),
        first_loss=sum(fitting.losses[:10]) / len(fitting.losses[:10]),
        last_loss=sum(fitting.losses[-10:]) / len(fitting.losses[-10:]),
        selected_step=fitting.selected_step,
        initial_validation_loss=fitting.validation[0],
        selected_validation_loss=fitting.validation[fitting.selected_step],
        initial_error=before.relative_error,
        initial_skill=before.skill,
        fitted_error=after.relative_error,
        fitted_error_interval=after.relative_error_interval,
        fitted_skill=after.skill,
        trivial_error=after.trivial_error,
    )


def make_layer(call: Call) -> Layer:
    """The cell's mechanism in a layer, with parameters of its own so that the cell's stay as they are."""
    mechanism = copy.deepcopy(call.mechanism)
    fixed = {name: x.detach() for name, x in call.extras.items() if name not in mechanism.gates()}
    return Layer(mechanism, fixed).to(call.q.device)


@dataclass(frozen=True)
class Fitting:
    """The course of a fit."""

    losses: list[float]
    """Of every step, before it."""
    validation: dict[int, float]
    """Number of steps taken -> loss on the draw that selects."""

    @property
    def selected_step(self) -> int:
        """Where the validation loss was least."""
        return min(self.validation, key=self.validation.__getitem__)


def fit(layer: Layer, cell: Cell, device: torch.device, *, steps: int, learning_rate: float) -> Fitting:
    """Train ``layer`` in fp32, and leave it as it was where its validation loss was least.

    Raises:
        ArithmeticError: a loss is not finite.
    """
    optimiser = torch.optim.Adam(layer.parameters(), lr=learning_rate)
    held = _Draw.of(inputs.another_draw(cell, 0), device)
    with torch.no_grad():
        fitting = Fitting([], {0: held.loss(layer).item()})
    best = copy.deepcopy(layer.state_dict())
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad(set_to_none=True)
        loss = _Draw.of(inputs.another_draw(cell, step + 1), device).loss(layer)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(layer.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        fitting.losses.append(loss.item())
        if not math.isfinite(fitting.losses[-1]):
            raise ArithmeticError(f"the loss of fitting is {fitting.losses[-1]} at step {step}")
        if (step + 1) % VALIDATION_STEPS == 0 or step + 1 == steps:
            with torch.no_grad():
                fitting.validation[step + 1] = held.loss(layer).item()
            if fitting.selected_step == step + 1:
                best = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(best)
    return fitting


class _Draw(NamedTuple):
    """Inputs in fp32, and exact attention on them."""

    q: Tensor
    k: Tensor
    v: Tensor
    truth: Tensor

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Self:
        q, k, v = (x.to(device) for x in inputs.draw(cell.model_copy(update={"dtype": "float32"})))
        return cls(q, k, v, exact_attention(q, k, v, cell.causal, dtype=torch.float32))

    def loss(self, layer: Layer) -> Tensor:
        """‖output − truth‖² / ‖truth‖²."""
        difference: Tensor = layer(self.q, self.k, self.v) - self.truth
        return difference.square().sum() / self.truth.square().sum()


def _judge(layer: Layer, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Error:
    with torch.no_grad():
        return measure_error(layer(q, k, v), q, k, v, causal=call.cell.causal, reading="error", seed=call.cell.seed)
