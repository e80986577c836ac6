"""Feature maps φ of linear attention, computed slab by slab, with their hand-written gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class FeatureMap(ABC):
    """φ on ``[..., L, D]`` -> ``[..., L, F]``, as a pair of a bounded matrix and a log scale per token.

    The true features of a token are ``exp(log_scale) · features``. Maps that cannot overflow have no log scale.
    A scale per *query* cancels in the normalised output, so only that of keys is ever used.
    """

    @abstractmethod
    def width(self, key_dim: int) -> int:
        """F, the number of features per token."""

    @abstractmethod
    def features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``[..., L, F]`` and log scales ``[..., L]`` or None. May return ``x`` itself; never changes it."""

    @abstractmethod
    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """The gradient for ``x`` ``[..., L, D]``; overwrites ``grad`` ``[..., L, F]``.

        ``grad`` is that of the loss for ``features`` with the log scales held fixed; because the output depends on
        features and scale through their product alone, it determines the gradient of both.
        """


class Identity(FeatureMap):
    """φ(x) = x: retention."""

    def width(self, key_dim: int) -> int:
        """D."""
        return key_dim

    def features(self, x: Tensor) -> tuple[Tensor, None]:
        """``x`` itself."""
        return x, None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """``grad`` itself."""
        return grad


class EluPlusOne(FeatureMap):
    """φ(x) = elu(x) + 1 (2006.16236, eq. 7): 1 + x for x > 0, exp(x) otherwise.

    Written as ``max(1 + x, exp(min(x, 0)))``, which keeps full relative precision where ``elu(x) + 1`` cancels to
    zero (fp32: x < −17). Since φ > 1 exactly where x > 0, the derivative is ``min(φ, 1)``.
    """

    def width(self, key_dim: int) -> int:
        """D."""
        return key_dim

    def features(self, x: Tensor) -> tuple[Tensor, None]:
        """Positive features, no scale."""
        return torch.maximum(x.clamp(max=0).exp_(), x + 1), None

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """``grad · min(φ, 1)``."""
        return grad.mul_(features.clamp(max=1))


class PositiveRandomFeatures(FeatureMap):
    """φ_r(x) = exp(w_r · x̃ − ‖x̃‖²/2) with x̃ = D^-1/4 x (2009.14794, lemma 1), up to a common factor F^-1/2.

    Split as ``exp(w_r · x̃ − max_r w_r · x̃)``, which lies in (0, 1], and the log scale ``max_r w_r · x̃ − ‖x̃‖²/2``.

    Args:
        projection: w_r as rows, ``[F, D]``, on the device and in the dtype of the computation.
    """

    def __init__(self, projection: Tensor) -> None:
        self.root_scale: float = projection.shape[-1] ** -0.25
        self.projection = projection * self.root_scale

    def width(self, key_dim: int) -> int:
        """The rows of the projection."""
        return len(self.projection)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features in (0, 1] and the log scale of every token."""
        logits = torch.matmul(x, self.projection.T)
        largest = logits.amax(-1, keepdim=True)
        half_norm = torch.linalg.vecdot(x, x) * (0.5 * self.root_scale**2)
        return logits.sub_(largest).exp_(), largest.squeeze(-1).sub_(half_norm)

    def gradient(self, x: Tensor, features: Tensor, grad: Tensor, *, of_keys: bool) -> Tensor:
        """``Σ_r g_r (w_r − x̃)`` with g = grad ∘ φ. For queries Σ_r g_r = 0: the output ignores their norm."""
        weighted = grad.mul_(features)
        gradient = torch.matmul(weighted, self.projection)
        if of_keys:
            gradient.addcmul_(weighted.sum(-1, keepdim=True), x, value=-(self.root_scale**2))
        return gradient
