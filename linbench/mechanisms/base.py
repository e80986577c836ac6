"""What every mechanism is: an operator on q, k, v, its implementations, its costs, and what it supports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms import fused
from linbench.mechanisms.claims import Claims, ExactLimit
from linbench.parameters import signature_model

Kind = Literal["exact", "approximator", "replacement", "hybrid"]
Growth = Literal["1", "N", "N log N", "N^1.5", "N^2"]
GENERATION = ("prefill", "step")
"""What an implementation may have a way of its own for, ``prefill_NAME`` and ``step_NAME``."""


@dataclass(frozen=True)
class Description:
    """What a mechanism is, for tables and for the plan."""

    summary: str
    """One line: the operator in words or in a formula."""
    kind: Kind
    """``approximator``: its distance to softmax is an error with a tested limit. ``replacement``: another operator."""
    causal_forms: tuple[bool, ...]
    """The values of ``causal`` for which the mechanism exists."""
    paper: str
    arxiv: str
    year: int
    time: Growth = "N"
    """How the time of a forward pass is claimed to grow; the report prints the measured exponent beside it."""
    memory: Growth = "N"
    """The same for the memory of a forward pass."""


@dataclass(frozen=True)
class Gate:
    """An extra that a layer computes from its input for every token: ``activation(x·W + b)``."""

    activation: Callable[[Tensor], Tensor]
    """From any real number, elementwise or over the last dimension, to the values that the operator takes."""
    width: int | None = None
    """Of the last dimension, ``[B, H, N, width]``; None for one number per token and head, ``[B, H, N]``."""
    precise: bool = False
    """Kept in fp32 at least where the inputs are shorter: logarithms of decays, which are summed over many tokens."""


@dataclass(frozen=True)
class Geometry:
    """The shape-independent part of a request: what a layer of a model would fix once."""

    heads: int
    key_dim: int
    """D, the width of a query or key per head."""
    value_dim: int
    """M, the width of a value per head."""
    causal: bool
    implementation: str = "torch"
    seed: int = 0
    """Seeds whatever is random in the mechanism: projections, features, hashes."""


class Mechanism(torch.nn.Module, ABC):
    """An attention mechanism ``(q, k, v, **extras) -> o`` in one implementation.

    A subclass is one file. Its constructor takes a :class:`Geometry` and its hyperparameters by name, each annotated
    with a pydantic type (ranges and choices included) and a default. It defines ``reference`` and one method
    ``forward_NAME`` for every other implementation that it has.

    Tensors are ``[B, H, N, ·]``: q ``[B, H, N, D]``, k ``[B, H, N_k, D]``, v ``[B, H, N_k, M]``, o ``[B, H, N, M]``.
    An extra with three dimensions or more belongs to tokens, ``[B, H, N, …]``; one with fewer belongs to all of them.
    Extras of floating type are differentiable. What is learned is a ``torch.nn.Parameter``, seeded by the geometry.

    An implementation that computes prompts and tokens in a way of its own defines ``prefill_NAME`` and ``step_NAME`` in
    the shapes of :meth:`prefill` and :meth:`step`, over states of the same make. All others are given the torch way.
    """

    description: ClassVar[Description]
    claims: ClassVar[Claims] = Claims()
    sequential_reference: ClassVar[bool] = False
    """The reference walks the tokens one by one, so that a plan has to allow for it."""
    kernel_forms: ClassVar[tuple[bool, ...]] = (True,)
    """The values of ``causal`` that the implementation ``triton`` has, where there is one."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.causal = geometry.causal
        self._implementation = getattr(self, f"forward_{geometry.implementation}")
        for way in GENERATION:
            if (own := getattr(self, f"{way}_{geometry.implementation}", None)) is not None:
                setattr(self, way, own)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """The operator, in the implementation that the mechanism was built with."""
        output: Tensor = self._implementation(q, k, v, **extras)
        return output

    @abstractmethod
    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The specification: eager, readable, differentiable, exact in the dtype that it is given (fp64 included).

        Args:
            rows: int64 positions of the queries to compute, ``[R]``; all when None. Costs O(R · N) at most where the
                operator allows it, so that long outputs can be judged on a sample.

        Returns:
            ``[B, H, R, M]``.
        """

    def forward_reference(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """The reference as an implementation of its own."""
        return self.reference(q, k, v, **extras)

    def gates(self) -> dict[str, Gate]:
        """The extras that a layer would compute from its input, by name; none for most."""
        return {}

    def make_extras(self, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the operator needs beyond q, k, v (decays, gates, …), drawn from ``generator``; nothing for most.

        The gates of a layer at initialisation: their activation of independent standard normal numbers. They require
        gradients exactly when v does.
        """
        extras = {}
        for name, gate in self.gates().items():
            shape = q.shape[:3] if gate.width is None else (*q.shape[:3], gate.width)
            raw = torch.randn(shape, generator=generator, dtype=torch.float64).to(q.device)
            dtype = torch.promote_types(q.dtype, torch.float32) if gate.precise else q.dtype
            extras[name] = gate.activation(raw).to(dtype).requires_grad_(v.requires_grad)
        return extras

    def target(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor | None:
        """What this mechanism approximates where that is not softmax(q·kᵀ/√D)·v; shapes as in :meth:`reference`."""
        return None

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit | None:
        """Settings at which ``length`` tokens give the target (softmax, or :meth:`target`) exactly; None without."""
        return None

    @property
    def steps_in_place(self) -> bool:
        """Whether :meth:`step` may overwrite the state that it is given, and gives it back changed."""
        return hasattr(type(self), f"step_{self.geometry.implementation}")

    @property
    def decodes(self) -> bool:
        """Whether it computes one token after the other from a state."""
        return self.causal and type(self).step is not Mechanism.step

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before the first token, for inputs in ``dtype``.

        Raises:
            UsageError: this mechanism does not decode.
        """
        raise UsageError(f"{type(self).__name__} has no decoding step")

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> tuple[Tensor, Any]:
        """One token of the causal form: q, k ``[B, H, D]``, v ``[B, H, M]``, and the extras of that token.

        Returns:
            o ``[B, H, M]`` and the state after the token. The two may share memory; still a step may be taken again
            from the state that was given, as long as none was taken from the one after it, which is lost with that.
            Where :attr:`steps_in_place`, the state that was given is lost too: copy it to start from it again.

        Raises:
            UsageError: this mechanism does not decode.
        """
        raise UsageError(f"{type(self).__name__} has no decoding step")

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Any]:
        """All tokens of a prompt, without gradient; shapes as in :meth:`forward`, N ≥ 1.

        This default takes one :meth:`step` after the other: right for whatever decodes, and slow. A mechanism with a
        parallel form overrides it.

        Returns:
            o ``[B, H, N, M]``, as :meth:`forward` gives it but for rounding, and the state after the last token, from
            which :meth:`step` goes on.

        Raises:
            UsageError: this mechanism does not decode.
        """
        self.require_decoding()
        state, outputs = self.initial_state(q.shape[0], q.device, q.dtype), []
        for token in range(q.shape[2]):
            row = q[:, :, token], k[:, :, token], v[:, :, token]
            output, state = self.step(*row, state, **extras_at(extras, token))
            outputs.append(output)
        return torch.stack(outputs, 2), state

    def require_decoding(self) -> None:
        """Refuse with a ``UsageError`` where :attr:`decodes` is false."""
        if not self.decodes:
            raise UsageError(f"{type(self).__name__}, as it was built, does not decode")

    def unsupported(self, cell: Cell) -> str | None:
        """Why this mechanism cannot run ``cell``, in one clause, or None when it can."""
        if cell.causal not in self.description.causal_forms:
            return f"{cell.mechanism} has no {'causal' if cell.causal else 'non-causal'} form"
        return fused.unsupported(cell, self.kernel_forms) if cell.implementation == fused.NAME else None

    @abstractmethod
    def flops(self, cell: Cell) -> int:
        """Floating-point operations of the cell's pass in an ideal implementation; one multiply-add is two."""

    @abstractmethod
    def min_bytes(self, cell: Cell) -> int:
        """Bytes that must cross memory in the cell's pass when every operand is read once and every result written."""

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """Bytes per batch element kept to decode the next token after ``length`` tokens; None without decoding.

        Of a buffer with room for more tokens, those of the rows that are filled.
        """
        return None

    def decode_flops(self, cell: Cell) -> int:
        """Floating-point operations of one token's :meth:`step`, for B and H of the cell; one multiply-add is two.

        The token is the last of ``cell.length``. By default one multiply-add for every number of the state after it,
        which is what reading it takes; a mechanism that rewrites its state overrides this.
        """
        return 2 * cell.batch * (self._stated(cell.length, torch.float64) // torch.float64.itemsize)

    def decode_bytes(self, cell: Cell) -> int:
        """Bytes that must cross memory in one token's :meth:`step`, the last of ``cell.length``, for B and H.

        The token's q, k, v, extras and o, the state before it read, and what changes of it written: what the state
        grows by, or all of a state that does not grow.
        """
        dtype = getattr(torch, cell.dtype)
        before, after = self._stated(cell.length - 1, dtype), self._stated(cell.length, dtype)
        written = after - before if after > before else after
        return self.token_bytes(cell) + cell.batch * (before + written)

    def token_bytes(self, cell: Cell) -> int:
        """Bytes of q, k, v, the :meth:`gates` and o of one token, for B and H."""
        each = 2 * (cell.head_dim + cell.value_dim) * cell.element_bytes
        for gate in self.gates().values():
            each += (gate.width or 1) * (max(cell.element_bytes, 4) if gate.precise else cell.element_bytes)
        return cell.batch * cell.heads * each

    def pass_flops(self, cell: Cell) -> int:
        """:meth:`flops` for any pass: a prefill is a forward, and a decode one step.

        Raises:
            UsageError: a prefill or a decode of a mechanism that does not decode.
        """
        if cell.pass_ not in ("prefill", "decode"):
            return self.flops(cell)
        self.require_decoding()
        return self.decode_flops(cell) if cell.pass_ == "decode" else self.flops(_as_forward(cell))

    def pass_bytes(self, cell: Cell) -> int:
        """:meth:`min_bytes` for any pass: a prefill is a forward that writes the state once, and a decode one step.

        Raises:
            UsageError: a prefill or a decode of a mechanism that does not decode.
        """
        if cell.pass_ not in ("prefill", "decode"):
            return self.min_bytes(cell)
        self.require_decoding()
        if cell.pass_ == "decode":
            return self.decode_bytes(cell)
        written = cell.batch * self._stated(cell.length, getattr(torch, cell.dtype))
        return self.min_bytes(_as_forward(cell)) + written

    def _stated(self, length: int, dtype: torch.dtype) -> int:
        """:meth:`state_bytes` where there has to be one."""
        stated = self.state_bytes(length, dtype)
        if stated is None:
            raise UsageError(f"{type(self).__name__}, as it was built, has no state to decode from")
        return stated

    @classmethod
    def generating(cls) -> tuple[str, ...]:
        """The implementations that prefill and decode in a way of their own; ``torch`` speaks for all others."""
        names = cls.implementations()
        if "torch" not in names:
            return names
        return tuple(x for x in names if x == "torch" or all(hasattr(cls, f"{way}_{x}") for way in GENERATION))

    @classmethod
    def implementations(cls) -> tuple[str, ...]:
        """The implementations that this mechanism has, ``reference`` first."""
        names = {name.removeprefix("forward_") for name in dir(cls) if name.startswith("forward_")}
        return ("reference", *sorted(names - {"reference"}))

    @classmethod
    def hyperparameters(cls) -> type[BaseModel]:
        """A pydantic model of the constructor's hyperparameters: types, ranges, choices and defaults."""
        return signature_model(f"{cls.__name__}Hyperparameters", cls.__init__, leave_out=("self", "geometry"))


class KernelEstimator(ABC):
    """A mechanism that estimates a kernel of a query and a key with random features; :class:`Mechanism` beside it."""

    @abstractmethod
    def relative_kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """The estimate over the kernel itself: q, k ``[P, D]`` -> ``[P]``, 1 where the estimate is exact."""

    @abstractmethod
    def expected_relative_mse(self, q: Tensor, k: Tensor) -> Tensor:
        """The closed form of E[(estimate / kernel − 1)²] over independent Gaussian rows: ``[P]``."""


def extras_until(extras: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The extras of the first ``tokens`` tokens, cut like those of :func:`extras_at`."""
    return {name: x[:, :, :tokens] if x.ndim >= 3 else x for name, x in extras.items()}


def extras_at(extras: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    """The extras of one token: those with three dimensions or more are cut, the others are given whole."""
    return {name: x[:, :, token] if x.ndim >= 3 else x for name, x in extras.items()}


def _as_forward(cell: Cell) -> Cell:
    """The cell of a forward in the same place."""
    return cell.model_copy(update={"pass_": "forward"})


def streaming_bytes(cell: Cell, extra_elements: float = 0) -> int:
    """Least traffic of an operator that reads q, k, v and its extras once and writes o once, and of its backward.

    Forward ``e·BHN(2D + 2M + X)``; the backward reads q, k, v, o, do and writes dq, dk, dv: ``e·BHN(4D + 4M + 2X)``.

    Args:
        cell: B, H, N, D, M, the pass and e, the bytes of an element.
        extra_elements: X, elements of extras per token and head, counted in the cell's dtype.
    """
    per_token = 2 * (cell.head_dim + cell.value_dim) + extra_elements
    forward = round(cell.element_bytes * cell.batch * cell.heads * cell.length * per_token)
    return forward * {"forward": 1, "backward": 2, "forward_backward": 3}[cell.pass_]
