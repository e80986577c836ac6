"""What is examined: one mechanism in one implementation and form, the shapes that it can take, and how it is called."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from linbench import registry
from linbench.cell import Cell, Scalar
from linbench.errors import UsageError
from linbench.mechanisms import fused
from linbench.mechanisms.base import Mechanism

DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
ROUNDING_FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Relative error that summing in another order may always leave."""
ROUNDING_CEILING = {torch.float64: 1e-10, torch.float32: 1e-4}
"""What no operator may exceed: the check before a measurement does not let it pass either."""


class Size(NamedTuple):
    """B, H, N, D, M."""

    batch: int
    heads: int
    tokens: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} N={self.tokens} D={self.key_dim} M={self.value_dim}"


class Operands(NamedTuple):
    """q ``[B, H, N, D]``, k ``[B, H, N_k, D]``, v ``[B, H, N_k, M]`` and the extras."""

    q: Tensor
    k: Tensor
    v: Tensor
    extras: dict[str, Tensor]

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """Every tensor changed."""
        extras = {name: change(x) for name, x in self.extras.items()}
        return Operands(change(self.q), change(self.k), change(self.v), extras)

    def tokenwise(self, change: Callable[[Tensor], Tensor]) -> Operands:
        """What belongs to tokens changed, ``[B, H, N, …]``; the other extras as they are."""
        return self.map(lambda x: change(x) if x.ndim >= 3 else x)

    def widened(self) -> Operands:
        """In fp64, on the values as they are rounded."""
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def narrowed(self) -> Operands:
        """In fp32."""
        return self.map(lambda x: x.float() if x.is_floating_point() else x)

    def leaves(self) -> Operands:
        """Copies of their own, in the same strides, that require gradients where they are of floating type."""
        return self.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)

    def named(self) -> dict[str, Tensor]:
        """The tensors of floating type by name."""
        every = {"q": self.q, "k": self.k, "v": self.v, **self.extras}
        return {name: x for name, x in every.items() if x.is_floating_point()}


@dataclass(frozen=True)
class Subject:
    """A mechanism in one implementation and form, with the hyperparameters that were asked for."""

    name: str
    causal: bool
    implementation: str
    target: str | None = None
    hyperparameters: dict[str, Scalar] = field(default_factory=dict)
    quick: bool = False
    device: str = "cpu"

    @property
    def cls(self) -> type[Mechanism]:
        """The mechanism's class."""
        return registry.load(self.name, self.target)

    @property
    def form(self) -> str:
        """The form in words."""
        return "causal" if self.causal else "not causal"

    @property
    def unavailable(self) -> str | None:
        """Why no kernel of this implementation can run here in this form; None when one can, or it is no kernel."""
        if self.implementation != fused.NAME:
            return None
        return fused.unavailable(self.device, self.causal, self.cls.kernel_forms)

    def sizes(self) -> list[Size]:
        """Odd sizes, all different; N = 1 and no multiple of any chunk among them. In the nearest supported shape."""
        asked = [Size(2, 3, 1, 5, 7), Size(1, 2, 150, 6, 5)]
        if not self.quick:
            asked += [Size(1, 4, 13, 8, 6), Size(2, 1, 65, 4, 6), Size(1, 3, 333, 16, 9), Size(1, 2, 1100, 64, 32)]
        found = [self.size(*size) for size in asked]
        return list(dict.fromkeys(found))

    def tokens(self, usual: int) -> int:
        """Fewer in the quick kit where a reference walks from one to the next: it has no chunks to straddle."""
        walks = self.implementation == "reference" and self.cls.sequential_reference
        return min(usual, 40) if self.quick and walks else usual

    def size(self, batch: int, heads: int, tokens: int, key_dim: int, value_dim: int) -> Size:
        """That size where it is supported, else the nearest that is.

        Raises:
            UsageError: no size near it is.
        """
        size, refusal = Size(batch, heads, tokens, key_dim, value_dim), None
        for candidate in _near(size):
            reason = self.refusal(candidate)
            if reason is None:
                return candidate
            refusal = refusal or reason
        raise UsageError(f"neither {size} nor a shape near it is supported: {refusal}")

    def refusal(self, size: Size) -> str | None:
        """Why the mechanism cannot take a size; None when it can."""
        try:
            return self._build(size.heads, size.key_dim, size.value_dim).unsupported(self.cell(size))
        except UsageError as error:
            return str(error)

    def cell(self, size: Size, dtype: torch.dtype = torch.float64, pass_: str = "forward") -> Cell:
        """The cell of a size, for the cost model."""
        return Cell.model_validate(
            {
                "mechanism": self.name,
                "target": self.target,
                "hyperparameters": self.hyperparameters,
                "implementation": self.implementation,
                "batch": size.batch,
                "heads": size.heads,
                "length": size.tokens,
                "head_dim": size.key_dim,
                "value_dim": size.value_dim,
                "dtype": DTYPE_NAMES[dtype],
                "causal": self.causal,
                "device": self.device,
                "pass": pass_,
            }
        )

    def draw(self, size: Size, dtype: torch.dtype = torch.float64, seed: int = 0, keys: int | None = None) -> Operands:
        """Standard normal q, k, v, drawn in fp64 and rounded, and the mechanism's own extras.

        Args:
            keys: N_k where it is not N.
        """
        generator = torch.Generator().manual_seed(1000 + seed)
        widths = (
            (size.tokens, size.key_dim),
            (keys or size.tokens, size.key_dim),
            (keys or size.tokens, size.value_dim),
        )
        q, k, v = (
            torch.randn(size.batch, size.heads, *width, generator=generator, dtype=torch.float64).to(self.device, dtype)
            for width in widths
        )
        return Operands(q, k, v, self.extras(q, k, v, seed))

    def extras(self, q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """The mechanism's extras for these q, k, v."""
        generator = torch.Generator().manual_seed(2000 + seed)
        mechanism = self._build(q.shape[1], q.shape[-1], v.shape[-1])
        with torch.no_grad():
            extras = mechanism.make_extras(q, k, v, generator)
        return {name: x.detach() for name, x in extras.items()}

    def tuned(self, **hyperparameters: Scalar) -> Subject:
        """The same with other hyperparameters."""
        return dataclasses.replace(self, hyperparameters={**self.hyperparameters, **hyperparameters})

    def build(self, x: Operands, implementation: str | None = None, seed: int = 0) -> Mechanism:
        """A new mechanism for operands of that geometry."""
        return self._build(x.q.shape[1], x.q.shape[-1], x.v.shape[-1], implementation, seed)

    def _build(
        self, heads: int, key_dim: int, value_dim: int, implementation: str | None = None, seed: int = 0
    ) -> Mechanism:
        mechanism = registry.build(
            self.name,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            causal=self.causal,
            implementation=implementation or self.implementation,
            seed=seed,
            target=self.target,
            **self.hyperparameters,
        )
        return mechanism.to(self.device)

    def run(self, x: Operands, implementation: str | None = None, seed: int = 0) -> Tensor:
        """The output of a mechanism that is built for this call: none remembers another call."""
        with torch.no_grad():
            output: Tensor = self.build(x, implementation, seed)(x.q, x.k, x.v, **x.extras)
        return output

    def reference(self, x: Operands, rows: Tensor | None = None, seed: int = 0) -> Tensor:
        """The specification in fp64 on the operands as they are rounded."""
        wide = x.widened()
        mechanism = copy.deepcopy(self.build(x, "reference", seed)).double()
        with torch.no_grad():
            return mechanism.reference(wide.q, wide.k, wide.v, rows, **wide.extras)

    def bound(self, x: Operands, expected: Tensor | None = None) -> float:
        """The error that rounding excuses: four times that of the reference itself in fp32, scaled to the dtype.

        An ill-conditioned operator (a solve, an iteration) so gets the tolerance that it needs, and no other does.

        Args:
            expected: what the reference gives for ``x``, if it is known.
        """
        narrow = x.narrowed()
        exact = expected if expected is not None and x.q.dtype is torch.float32 else self.reference(narrow)
        return rounding_bound(relative_error(self.run(narrow, "reference"), exact), x.q.dtype)


def rounding_bound(own_error: float, dtype: torch.dtype) -> float:
    """A bound in ``dtype`` from the relative error that the reference itself has in fp32."""
    scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    own = own_error if own_error < torch.inf else 0.0
    return min(max(4 * own * scale, ROUNDING_FLOOR[dtype]), ROUNDING_CEILING[dtype])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of ``expected``; infinite where anything found is not finite."""
    if not bool(found.isfinite().all()):
        return torch.inf
    expected = expected.double()
    tiny = torch.finfo(torch.float64).tiny
    return float((found.double() - expected).norm() / expected.norm().clamp_min(tiny))


def dtype_name(dtype: torch.dtype) -> str:
    """As a person writes it."""
    return DTYPE_NAMES[dtype]


def _near(size: Size) -> list[Size]:
    """The size itself, then ever less odd ones."""
    widths = [
        (size.key_dim, size.value_dim),
        (size.key_dim, size.key_dim),
        (size.value_dim, size.value_dim),
        *((width, width) for width in (_even(size.key_dim), 4, 8, 16, 32, 64, 128)),
    ]
    heads = dict.fromkeys([size.heads, _even(size.heads), 4])
    tokens = dict.fromkeys([size.tokens, _even(size.tokens), 64, 128, 256])
    return [
        Size(size.batch, head, token, *width) for token in tokens for head in heads for width in dict.fromkeys(widths)
    ]


def _even(number: int) -> int:
    return number + number % 2
