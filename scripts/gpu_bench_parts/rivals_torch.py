"""Exact attention as torch has it, each backend for itself; and one linear mechanism of ours beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_bench_parts.bench import build
from gpu_bench_parts.rivals import Operator, Rival, StepRival, heads_first
from linbench.mechanisms.base import Mechanism

BACKENDS = {
    "FLASH_ATTENTION": SDPBackend.FLASH_ATTENTION,
    "CUDNN_ATTENTION": SDPBackend.CUDNN_ATTENTION,
    "EFFICIENT_ATTENTION": SDPBackend.EFFICIENT_ATTENTION,
}


def exact(backend: SDPBackend) -> Callable[[Mechanism], Operator]:
    """Causal attention in one backend; torch raises where that cannot take the shape, the dtype or the device."""

    def make(_: Mechanism) -> Operator:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True)
            return out.transpose(1, 2)

        return attend

    return make


def retnet(softmax: Mechanism) -> Operator:
    """Retention in our kernels: what exact attention costs beside it."""
    about = softmax.geometry
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mechanism = build("retnet", "triton", about.heads, about.key_dim, about.value_dim, torch.device(device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = mechanism(*heads_first(q, k, v))
        return out.transpose(1, 2)

    return attend


RIVALS = (
    *(Rival("softmax", "torch", f"SDPA {name}", exact(backend)) for name, backend in BACKENDS.items()),
    Rival("softmax", "linbench", "retnet, another operator", retnet, unlike=True),
)
STEP_RIVALS: tuple[StepRival, ...] = ()
