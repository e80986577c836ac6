"""Feature maps φ of linear attention, computed slab by slab, with their hand-written gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.cores.exponential import exp_
from linbench.mechanisms.cores.slabs import CHUNK, Memory, Slab, taken


class FeatureMap(ABC):
    """φ on ``[..., L, D]`` -> ``[..., L, F]``, as a pair of a bounded matrix and a log scale per token.

    The true features of a token are ``exp(log_scale) · features``. Maps that cannot overflow have no log scale.
    A scale per *query* cancels in the normalised output, so only that of keys is ever used.
    """

    chunk: int = CHUNK
    """C of the causal form: what is fastest on a CPU, or a block of the operator."""
    scaled: ClassVar[bool] = False
    """Whether there is a log scale."""
    paired: bool = False
    """Whether the weights inside a chunk come from :meth:`pair_weights` instead of φ(q)·φ(k)."""

    @abstractmethod
    def width(self, key_dim: int) -> int:
        """F, the number of features per token."""

    def at(self, slab: Slab) -> FeatureMap:
        """The map for the tokens of a slab; another one only where φ depends on the position."""
        return self

    @abstractmethod
    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor | None]:
        """Features ``[..., L, F]`` and log scales ``[..., L]`` or None. May return ``x`` itself; never changes it.

        Args:
            x: ``[..., L, D]``.
            memory: where to write them, for callers that need them no longer than the next ones, and no autograd.
        """

    @abstractmethod
    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """The gradient for ``x`` ``[..., L, D]``; overwrites ``grad`` ``[..., L, F]``.

        ``grad`` is that of the loss for ``features`` with the log scales held fixed; because the output depends on
        features and scale through their product alone, it determines the gradient of both.
        """

    def pair_weights(self, products: Tensor) -> Tensor:
        """Weights ``[P, C, C]`` of the pairs of a chunk from their ``q·kᵀ``, which is left as it is."""
        raise NotImplementedError

    def pair_gradient(self, products: Tensor, grad: Tensor) -> Tensor:
        """The gradient for ``products`` from that for their weights, which it may overwrite."""
        raise NotImplementedError


class Identity(FeatureMap):
    """φ(x) = x: retention."""

    def width(self, key_dim: int) -> int:
        """D."""
        return key_dim

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """``x`` itself."""
        return x, None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """``grad`` itself."""
        return grad


class EluPlusOne(FeatureMap):
    """φ(x) = elu(x) + 1 (2006.16236, eq. 7): 1 + x for x > 0, exp(x) otherwise.

    Written as ``exp(min(x, 0)) + max(x, 0)``, which keeps full relative precision where ``elu(x) + 1`` cancels to
    zero (fp32: x < −17). Since φ > 1 exactly where x > 0, the derivative is ``min(φ, 1)``.
    """

    def width(self, key_dim: int) -> int:
        """D."""
        return key_dim

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Positive features, no scale."""
        positive = torch.clamp(x, min=0, out=taken(memory, "positive", x))
        return exp_(torch.clamp(x, max=0, out=taken(memory, "features", x))).add_(positive), None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """``grad · min(φ, 1)``."""
        return grad.mul_(features.clamp(max=1))


class PositiveRandomFeatures(FeatureMap):
    """φ_r(x) = exp(w_r · x̃ − ‖x̃‖²/2) with x̃ = D^-1/4 x (2009.14794, lemma 1), up to a common factor F^-1/2.

    Split as ``exp(w_r · x̃ − max_r w_r · x̃)``, which lies in (0, 1], and the log scale ``max_r w_r · x̃ − ‖x̃‖²/2``.

    Args:
        projection: w_r as rows, ``[F, D]``, on the device and in the dtype of the computation.
    """

    scaled: ClassVar[bool] = True

    def __init__(self, projection: Tensor) -> None:
        self.root_scale: float = projection.shape[-1] ** -0.25
        self.projection = projection * self.root_scale

    def width(self, key_dim: int) -> int:
        """The rows of the projection."""
        return len(self.projection)

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
        """Features in (0, 1] and the log scale of every token."""
        out = taken(memory, "features", x, *x.shape[:-1], len(self.projection))
        logits = torch.matmul(x, self.projection.T, out=out)
        largest = logits.amax(-1, keepdim=True)
        half_norm = torch.linalg.vecdot(x, x) * (0.5 * self.root_scale**2)
        return exp_(logits.sub_(largest)), largest.squeeze(-1).sub_(half_norm)

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """``Σ_r g_r (w_r − x̃)`` with g = grad ∘ φ. For queries Σ_r g_r = 0: the output ignores their norm."""
        weighted = grad.mul_(features)
        gradient = torch.matmul(weighted, self.projection)
        if of_keys:
            gradient.addcmul_(weighted.sum(-1, keepdim=True), x, value=-(self.root_scale**2))
        return gradient


class UnitAndOne(FeatureMap):
    """φ(x) = [√t x/‖x‖, 1], so that φ(q)·φ(k) = 1 + t cos(q, k) (2007.14902, eq. 14 for t = 1). Zeros give [0, 1].

    Args:
        sharpness: t.
    """

    def __init__(self, sharpness: float = 1.0) -> None:
        self.length = sharpness**0.5

    def width(self, key_dim: int) -> int:
        """D + 1."""
        return key_dim + 1

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Entries in [−1, 1]."""
        return torch.nn.functional.pad(unit(x).mul_(self.length), (0, 1), value=1.0), None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """√t (g − x̂⟨g, x̂⟩)/‖x‖ for the unit vector x̂; the constant has none."""
        longer, grad = features[..., :-1], grad[..., :-1]
        grad = grad.addcmul_(torch.linalg.vecdot(grad, longer)[..., None], longer, value=-(self.length**-2))
        return grad.div_(safe_norm(x) / self.length)


CLOSE = 20.0
"""Entries of a token no further apart than this have exponentials whose reciprocals keep their digits."""


class SplitSoftmax(FeatureMap):
    """φ(x) = [softmax(x), softmax(−x)] over the entries of a token (2402.04347, eq. 6).

    Args:
        together: whether one token may decide how the others are computed, which no future token may.
    """

    def __init__(self, *, together: bool) -> None:
        self.together = together

    def width(self, key_dim: int) -> int:
        """2D."""
        return 2 * key_dim

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Entries in [0, 1] whose sum is two."""
        shape = (*x.shape[:-1], 2, x.shape[-1])
        if self.together and memory is not None and x.device.type == "cpu":
            lowest, highest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # far faster than both in one call
            if (highest - lowest).amax().item() <= CLOSE:
                return _reciprocal_softmax(x, (lowest + highest) / 2, memory, shape), None
        both = torch.stack((x, x.neg()), -2, out=taken(memory, "both", x, *shape))
        return torch.softmax(both, -1, out=taken(memory, "features", x, *shape)).flatten(-2), None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """The derivative p ∘ (g − ⟨g, p⟩) of each softmax, the second one negated."""
        both, grads = (y.view(*x.shape[:-1], 2, x.shape[-1]) for y in (features, grad))
        slopes = grads.sub_(torch.linalg.vecdot(grads, both)[..., None]).mul_(both)
        gradient: Tensor = slopes[..., 0, :] - slopes[..., 1, :]
        return gradient


def _reciprocal_softmax(x: Tensor, middle: Tensor, memory: Memory, shape: tuple[int, ...]) -> Tensor:
    """Both softmaxes from one exponential, as e^-y = 1/e^y: entries differ by :data:`CLOSE` at most."""
    features = memory.take("features", x, *shape)
    powers = exp_(torch.sub(x, middle, out=memory.take("powers", x)))
    torch.mul(powers, powers.sum(-1, keepdim=True).reciprocal_(), out=features[..., 0, :])
    powers.reciprocal_()
    torch.mul(powers, powers.sum(-1, keepdim=True).reciprocal_(), out=features[..., 1, :])
    return features.flatten(-2)


class RandomFourier(FeatureMap):
    """φ(x) = [sin w_r·x, cos w_r·x], whose products average to exp(−‖q − k‖²/2) (2103.02143, eq. 4) up to 1/F.

    Args:
        projection: w_r as rows, ``[F/2, D]``, on the device and in the dtype of the computation.
    """

    def __init__(self, projection: Tensor) -> None:
        self.projection = projection

    def width(self, key_dim: int) -> int:
        """Two for every row of the projection."""
        return 2 * len(self.projection)

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Entries in [−1, 1]."""
        angles = torch.matmul(x, self.projection.T)
        return torch.cat([angles.sin(), angles.cos()], -1), None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """Σ_r (g_sin cos − g_cos sin)_r w_r."""
        (sin, cos), (sin_grad, cos_grad) = features.chunk(2, -1), grad.chunk(2, -1)
        return torch.matmul(sin_grad.mul_(cos).addcmul_(cos_grad, sin, value=-1), self.projection)


class Turned(FeatureMap):
    """φ(x) at position t = [x cos a_t, x sin a_t] with a_t = π t / 2M: q_i·k_j cos(a_i − a_j) (2202.08791, eq. 10).

    Args:
        horizon: M.
        turns: cos a_t and sin a_t, ``[2, N, 1]``; of a slab ``[2, P, C, 1]``.
    """

    paired = True

    def __init__(self, horizon: int, turns: Tensor) -> None:
        self.horizon, self.turns = horizon, turns

    def width(self, key_dim: int) -> int:
        """2D."""
        return 2 * key_dim

    def at(self, slab: Slab) -> Turned:
        """The angles of the slab's tokens."""
        inside = self.turns[:, slab.tokens].view(2, slab.chunks, slab.length, 1)
        return Turned(self.horizon, inside.repeat(1, slab.heads.stop - slab.heads.start, 1, 1))

    def features(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, None]:
        """Two scaled copies."""
        cos, sin = self.turns
        return torch.cat([x * cos, x * sin], -1), None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """g_cos cos a_t + g_sin sin a_t."""
        cos, sin = self.turns
        cos_grad, sin_grad = grad.chunk(2, -1)
        return cos_grad.mul_(cos).addcmul_(sin_grad, sin)

    def pair_weights(self, products: Tensor) -> Tensor:
        """``cos(a_i − a_j)`` times the product: half the work of 2D features."""
        return products * self._between(products)

    def pair_gradient(self, products: Tensor, grad: Tensor) -> Tensor:
        """The same factor."""
        return grad.mul_(self._between(products))

    def _between(self, like: Tensor) -> Tensor:
        token = torch.arange(like.shape[-1], device=like.device, dtype=torch.float64)
        return (math.pi / 2 / self.horizon * (token[:, None] - token)).cos().to(like)


def safe_norm(x: Tensor) -> Tensor:
    """‖x‖ over the last dimension, ``[..., 1]``, and infinity for a row of zeros."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.masked_fill(norm == 0, torch.inf)


def unit(x: Tensor) -> Tensor:
    """x/‖x‖ over the last dimension; a row of zeros stays one, and has no gradient."""
    return x / safe_norm(x)
