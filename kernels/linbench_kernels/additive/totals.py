"""Gradients of the decays from the dots that the backward kept: a sum from the end, one program for every head."""

import triton
import triton.language as tl

from linbench_kernels.additive.spans import span


@triton.jit(do_not_specialize=["length"])
def decay_gradient_kernel(
    q_dots,
    k_dots,
    q_weight,
    k_weight,
    met,
    gradient,
    cu_seqlens,
    heads,
    length,
    batches,
    Q_BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d(log decay)_t = Σ_{s≥t} (q_s·dq_s − k_s·dk_s) + ⟨S_N, dS_N⟩, exact in exact arithmetic.

    A log decay multiplies all that later tokens see of earlier ones; the sum of what the later ones see, less what
    they say themselves, is that. Grid (S·H,).

    Args:
        q_dots: ``[Q_BLOCKS, B, H, N]``, summed over the first; ``k_dots`` the same with K_BLOCKS.
        q_weight: ``[B, H, N]`` that the dots have yet to be multiplied by, or None; ``k_weight`` the same.
        met: ⟨S_N, dS_N⟩, ``[Q_BLOCKS, S·H]``, summed over the first, or None.
        gradient: ``[B, H, N]``.
        batches: B.
    """
    index = tl.program_id(0)
    _, _, batch, head, first, tokens = span(index, cu_seqlens, heads, length, 1, ROWS, False)
    number = (batch.to(tl.int64) * heads + head) * length + first
    numbers = length.to(tl.int64) * heads * batches
    from_later = tl.zeros([1], dtype=tl.float64)
    if met is not None:
        for block in tl.static_range(Q_BLOCKS):
            from_later += tl.load(met + block * tl.num_programs(0) + index)
    blocks = tl.cdiv(tokens, ROWS)
    for step in range(0, blocks):
        rows = (blocks - 1 - step) * ROWS + tl.arange(0, ROWS)
        inside = rows < tokens
        q_sum = tl.zeros([ROWS], dtype=tl.float64)
        k_sum = tl.zeros([ROWS], dtype=tl.float64)
        for block in tl.static_range(Q_BLOCKS):
            q_sum += tl.load(q_dots + block * numbers + number + rows, mask=inside, other=0.0)
        for block in tl.static_range(K_BLOCKS):
            k_sum += tl.load(k_dots + block * numbers + number + rows, mask=inside, other=0.0)
        if q_weight is not None:
            q_sum *= tl.load(q_weight + number + rows, mask=inside, other=0.0)
        if k_weight is not None:
            k_sum *= tl.load(k_weight + number + rows, mask=inside, other=0.0)
        change = q_sum - k_sum
        total = tl.sum(change, 0)
        tl.store(gradient + number + rows, from_later + total - tl.cumsum(change, 0) + change, mask=inside)
        from_later += total
