"""FlashQLA: the gated delta rule in TileLang, for Hopper and Blackwell, with a backward."""

from __future__ import annotations

from gpu_bench_parts.rivals import Operator, Rival
from linbench.mechanisms.base import Mechanism


def gated_deltanet(_: Mechanism) -> Operator:
    """Rows are scaled to norm one in its kernels."""
    from flash_qla import chunk_gated_delta_rule

    return lambda q, k, v, beta, log_decay: chunk_gated_delta_rule(
        q, k, v, g=log_decay, beta=beta, use_qk_l2norm_in_kernel=True
    )[0]


RIVALS = (Rival("gated_deltanet", "flash_qla", "chunk_gated_delta_rule", gated_deltanet),)
