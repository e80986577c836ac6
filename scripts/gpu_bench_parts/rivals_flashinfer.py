"""FlashInfer: the gated delta rule for inference, packed sequences and no backward; and its token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_bench_parts.rivals import Once, Operator, Rival, Step, StepRival
from linbench.mechanisms.base import Mechanism


def gated_deltanet(_: Mechanism) -> Operator:
    """It takes the decay itself and not its logarithm, and both gates in fp32: made once, and not timed."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    def packed(beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, heads = beta.shape
        borders = torch.arange(batch + 1, device=beta.device, dtype=torch.int64) * tokens
        return log_decay.exp().float().view(-1, heads), beta.float().view(-1, heads), borders

    gates = Once(packed)

    def attend(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
        decay, strength, borders = gates(beta, log_decay)
        q, k, flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        options = {"cu_seqlens": borders, "use_qk_l2norm_in_kernel": True}
        out: Tensor = chunk_gated_delta_rule(q, k, flat, decay, strength, **options)
        return out.view(v.shape)

    return attend


def step(_: Mechanism) -> Step:
    """In place, for D and M from 128 on; it makes both gates of what a layer has before them: inverted here, once."""
    from flashinfer.gdn_decode import gated_delta_rule_decode

    def before(beta: Tensor, log_decay: Tensor) -> dict[str, Tensor]:
        heads = beta.shape[1]
        zeros = torch.zeros(heads, device=beta.device)
        raw = torch.log(torch.expm1(-log_decay.double())).to(beta.dtype)
        logits = torch.logit(beta.double()).to(beta.dtype)
        return {"A_log": zeros, "a": raw[:, None], "dt_bias": zeros.clone(), "b": logits[:, None]}

    gates = Once(before)

    def token(q: Tensor, k: Tensor, v: Tensor, state: Tensor, beta: Tensor, log_decay: Tensor) -> Any:
        rows = (x[:, None] for x in (q, k, v))
        out, after = gated_delta_rule_decode(*rows, state, **gates(beta, log_decay), use_qk_l2norm=True)
        return out[:, 0], after

    return token


RIVALS = (Rival("gated_deltanet", "flashinfer", "gdn_prefill.chunk_gated_delta_rule", gated_deltanet, backward=False),)
STEP_RIVALS = (StepRival("gated_deltanet", "flashinfer", "gdn_decode.gated_delta_rule_decode", step),)
