"""What every part needs to do one of its items: the device, inputs, and the words for what went wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts.plan import Extent
from linbench import registry
from linbench.errors import UsageError
from linbench.mechanisms.base import Mechanism

FIXED: dict[str, dict[str, Any]] = {"cosformer": {"max_length": 2**18}}
"""Hyperparameters whose defaults do not suit every length."""


POISONED = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch failure")
"""What torch says when everything after it would fail as well."""


class RefusedError(Exception):
    """Why an item has no result, in one clause: nothing is wrong."""


class UnfinishedError(Exception):
    """The time of this run is over; the item is taken up by the next one."""


@dataclass(frozen=True)
class Bench:
    """Where a part runs."""

    extent: Extent
    folder: Path
    """Of the records."""
    until: float
    """When this run ends, in seconds since the epoch."""

    @property
    def device(self) -> torch.device:
        """The first device of its kind."""
        return torch.device("cpu") if self.extent.rehearsal else torch.device("cuda", 0)

    @property
    def left_s(self) -> float:
        """Seconds until this run ends."""
        return self.until - time.time()


@dataclass(frozen=True)
class Given:
    """A mechanism and its inputs, laid out in memory as models have them: ``[B, N, H, ·]``."""

    mechanism: Mechanism
    leaves: dict[str, Tensor]
    """q, k, v and the extras of tokens, ``[B, N, H, ·]``, contiguous."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The leaves in their order."""
        return tuple(self.leaves.values())

    def heads_first(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Tensors in the order of the leaves by name, as views ``[B, H, N, ·]``."""
        return {name: x.transpose(1, 2) for name, x in zip(self.leaves, tensors, strict=True)}

    def ours(self, *tensors: Tensor) -> Tensor:
        """The mechanism on tensors in the order of the leaves: ``[B, N, H, M]``."""
        out: Tensor = self.mechanism(**self.heads_first(*tensors))
        return out.transpose(1, 2)


def build(name: str, implementation: str, heads: int, key_dim: int, value_dim: int, device: torch.device) -> Mechanism:
    """A causal mechanism.

    Raises:
        RefusedError: it cannot be built so.
    """
    sizes = {"heads": heads, "key_dim": key_dim, "value_dim": value_dim}
    try:
        built = registry.build(name, implementation=implementation, causal=True, **sizes, **FIXED.get(name, {}))
    except UsageError as error:
        raise RefusedError(str(error)) from error
    return built.to(device)


def draw(
    mechanism: Mechanism, batch: int, tokens: int, dtype: torch.dtype, device: torch.device, grad: bool, seed: int = 1
) -> Given:
    """Independent normal q, k and v, and the gates of a layer at initialisation."""
    about, generator = mechanism.geometry, torch.Generator(device).manual_seed(seed)
    widths = {"q": about.key_dim, "k": about.key_dim, "v": about.value_dim}
    leaves = {
        name: torch.randn(batch, tokens, about.heads, width, generator=generator, device=device).to(dtype)
        for name, width in widths.items()
    }
    views = [x.transpose(1, 2) for x in leaves.values()]
    extras = mechanism.make_extras(*views, torch.Generator().manual_seed(seed))
    leaves |= {name: x.detach().transpose(1, 2).contiguous() for name, x in extras.items()}
    return Given(mechanism, {name: x.requires_grad_(grad) for name, x in leaves.items()})


def relative(found: Tensor, expected: Tensor, at_least: float = 1e-300) -> float:
    """Frobenius norm of the difference over that of what is expected; infinite where anything is not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(at_least))


def told(errors: Mapping[str, float]) -> dict[str, float | str]:
    """Errors as JSON has them: what is not finite in words."""
    return {name: float(f"{x:.3g}") if x < float("inf") else "not finite" for name, x in errors.items()}
