"""RWKV-7 "Goose": a generalised delta rule with removal and replacement of its own for every channel (2503.14456)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from linbench.mechanisms.base import Description, Gate, Geometry
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.delta import Operands
from linbench.mechanisms.cores.delta_state import DeltaState, Unit, unit
from linbench.mechanisms.cores.segments import State
from linbench.mechanisms.fused import require


class RWKV7(DeltaState):
    """S_t = S_{t−1} (diag(w_t) − κ̂_tᵀ (a_t ∘ κ̂_t)) + v_tᵀ k̃_t, o_t = r_t S_tᵀ, with S ``[M, D]`` (section 4.1).

    q is the receptance r; κ̂ = (k ∘ ξ)/‖k ∘ ξ‖ is what is removed and k̃ = k ∘ (1 + (a − 1) ∘ α) what is put in its
    place, with weights ξ and α per channel. Extras are the decay, log w = −e^-½ σ(d), and a, the in-context learning
    rate. What is removed is read before the decay.

    The operator alone. Left out, because they act before and after it: the token shift, the mixture of v with that of
    the first layer, the group norm, the bonus (r · (ρ ∘ k̃)) v, which is added after that norm, and the gate.
    """

    description: ClassVar[Description] = Description(
        summary="S = S(diag(w) − κ̂ᵀ(a∘κ̂)) + vᵀk̃, o = rSᵀ: decay, removal and replacement per channel",
        kind="replacement",
        causal_forms=(True,),
        paper='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        arxiv="2503.14456",
        year=2025,
    )
    separate_keys: ClassVar[bool] = True

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        width, dim = geometry.heads * geometry.key_dim, geometry.key_dim
        along = torch.linspace(-0.5, 0.5, width, dtype=torch.float64).view(geometry.heads, 1, dim)
        across = torch.linspace(-1, 1, dim, dtype=torch.float64)
        self.removal = torch.nn.Parameter(0.71 - 0.1 * along)
        """ξ, fp64 ``[H, 1, D]``, started as in the authors' code; move the module to a device, but do not cast it."""
        self.replacement = torch.nn.Parameter(torch.full_like(along, 1.02))
        """α, the same."""
        self.decay_bias = 6 * along - 2.5 + 2.5 * across * across.abs()
        """What the authors' first layer adds to d, and below to the logits of a: fast and slow channels in a head."""
        self.rate_bias = -0.19 + 0.4 * along + 0.3 * across * across.abs()

    def gates(self) -> dict[str, Gate]:
        """``log_decay`` in (−e^-½, 0) and ``in_context_rate`` in (0, 1), both ``[B, H, N, D]``."""
        dim = self.geometry.key_dim
        return {
            "log_decay": Gate(lambda raw: -math.exp(-0.5) * (raw + self.decay_bias.to(raw)).sigmoid(), dim, True),
            "in_context_rate": Gate(lambda raw: (raw + self.rate_bias.to(raw)).sigmoid(), dim),
        }

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """ξ and α."""
        return self.removal, self.replacement

    def operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor], *weights: Tensor) -> Operands:
        """Reads −κ̂, writes a∘κ̂, and k̃ beside it."""
        removal, replacement = weights
        rate = extras["in_context_rate"]
        removed = Unit.apply(k * removal, 1.0)  # type: ignore[no-untyped-call]
        return Operands(q, -removed, rate * removed, v, extras["log_decay"], k + k * (rate - 1) * replacement)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The recurrence with its transition matrix written out, on S ``[M, D]`` transposed."""
        self.check(q, k, extras)

        def step(state: State, r: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, State]:
            log_decay, rate = rest[:2]
            removal, replacement = (x.squeeze(1) for x in rest[2:])
            removed = unit(k * removal)
            transition = torch.diag_embed(log_decay.exp()) - removed[..., :, None] * (rate * removed)[..., None, :]
            replaced = k * (1 + (rate - 1) * replacement)
            present = state[0].mT @ transition + v[..., :, None] * replaced[..., None, :]
            return torch.einsum("bhmd,bhd->bhm", present, r), (present.mT,)

        return self.walked(step, None, rows, q, k, v, *(extras[name] for name in self.gates()))

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """Two kernels forward and four backward, after torch has made what is removed and written of the inputs."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.channel_delta import attention

        return attention(**self.kernel_operands(q, k, v, extras))[0]

    @torch.no_grad()
    def prefill_triton(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """The forward, which has the state at its end."""
        self.check(q, k, extras)
        require(q.device.type)
        from linbench_kernels.channel_delta import attention

        out, state = attention(**self.kernel_operands(q, k, v, extras), return_state=True)
        assert state is not None, "it was asked for"
        return out, state

    @torch.no_grad()
    def step_triton(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
        """One launch that reads the state and writes it once."""
        require(q.device.type)
        from linbench_kernels.channel_delta import step

        return step(**self.kernel_operands(q, k, v, extras), state=state), state

    def kernel_operands(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Tensor]) -> dict[str, Any]:
        """What is removed and written of a sequence or of a token, by the names that the kernels have for them."""
        precise, token = compute_dtype(v), q.ndim == 3
        weights = (weight.squeeze(1).to(precise) if token else weight.to(precise) for weight in self.weights)
        x = self.operands(q, k.to(precise), v, extras, *weights)
        assert x.keys is not None
        removed, written, keys = (y.to(v.dtype) for y in (-x.read, x.write, x.keys))
        told = {"log_decay": extras["log_decay"], "removed": removed, "written": written}
        return {"q": q, "k": keys, "v": v, **told}
