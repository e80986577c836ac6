"""Efficient Attention: softmax over the channels of queries and over the tokens of keys (1812.01243)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims
from linbench.mechanisms.cores.additive import chosen
from linbench.mechanisms.cores.chunked import ChunkedAttention, Operator, compute_dtype, walk_slabs
from linbench.mechanisms.cores.decay import decayed_attention
from linbench.mechanisms.cores.features import Identity
from linbench.mechanisms.cores.scans import Run, Space, head_parts, max_scan_, runs, scan_, scan_gradient_
from linbench.mechanisms.cores.segments import State, recurrent
from linbench.mechanisms.cores.slabs import CHUNK
from linbench.mechanisms.cores.streams import Keys, Queries, pool, read
from linbench.mechanisms.cores.token_softmax import TokenSoftmax
from linbench.mechanisms.fused import require

ELEMENTS = 2**16
"""Tokens times channels of a run in which sums over the past are made."""


class Efficient(Mechanism):
    """o_i = Σ_c ρ_q(q)_ic Σ_j ρ_k(k)_jc v_j, ρ_q(q)(ρ_k(k)ᵀv) with the small product first (section 3.2).

    ``softmax``: ρ_q is softmax over the D channels of a query and ρ_k softmax over the tokens of a channel of the keys.
    Each channel is a map of weights over all tokens, each query a mean of D such maps: rows sum to one, and their rank
    is D at most. There is no 1/√D. ``scaling``: q/√N and k/√N, which is dot-product attention (qkᵀ)v/N itself, in
    another order of the products; N is that of the keys. Its rows do not sum to one.

    The paper has no causal form. Ours is what the last token of each prefix sees: ρ_k over the past in every channel,
    and 1/t for 1/N. Code that divides by one sum over all channels instead is another operator.

    Left out, because they act before and after it: the projections, and the residual connection.

    Args:
        normalization: ρ.
    """

    description: ClassVar[Description] = Description(
        summary="softmax of q over channels times (softmax of k over tokens)ᵀv: D maps of weights, mixed by each query",
        kind="replacement",
        causal_forms=(False, True),
        paper="Efficient Attention: Attention with Linear Complexities",
        arxiv="1812.01243",
        year=2018,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(row_stochastic=True, permutation_equivariant=True, duplication_invariant=True)
    sequential_reference: ClassVar[bool] = True
    kernel_forms: ClassVar[tuple[bool, ...]] = (False,)

    def __init__(self, geometry: Geometry, normalization: Literal["softmax", "scaling"] = "softmax") -> None:
        super().__init__(geometry)
        self.scaling = normalization == "scaling"

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The two products; causal, the recurrence of their state up to the last row."""
        self._check(q, k)
        if self.causal:
            dtype = compute_dtype(v)
            tokens = q.shape[-2] if rows is None else int(rows.max()) + 1
            streams = [x[:, :, :tokens].to(dtype) for x in (q, k, v)]
            out, _ = recurrent(self._advance, self.initial_state(q.shape[0], q.device, dtype), streams)
            return (out if rows is None else out[:, :, rows]).to(v.dtype)
        queries, length = chosen(q, rows), k.shape[-2]
        if self.scaling:
            queries, maps = queries * length**-0.5, k * length**-0.5
        else:
            queries, maps = queries.softmax(-1), k.softmax(-2)
        mixed: Tensor = queries @ (maps.mT @ v)
        return mixed

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Two streaming passes, or chunks with a state that every channel keeps relative to its largest key so far."""
        self._check(q, k)
        if self.causal:
            return self._causal(q, k, v)
        if self.scaling:
            products = pool(lambda tokens, shared: Keys(*tokens), (k, v)).products / k.shape[-2]
            return read(lambda tokens, shared: Queries(*tokens), (q,), products, dtype=v.dtype)
        out: Tensor = TokenSoftmax.apply(*(x.flatten(0, 1) for x in (q, k, v)))  # type: ignore[no-untyped-call]
        return out.view(*q.shape[:2], *out.shape[1:])

    def forward_triton(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Fused, without a mask: an online softmax over the tokens in the pass over the keys, then one over queries.

        Raises:
            UsageError: the kernels cannot run here, or have no such form.
        """
        self._check(q, k)
        require(q.device.type, self.causal, self.kernel_forms)
        from linbench_kernels.noncausal import pool as pool_sums
        from linbench_kernels.noncausal import read as read_sums

        if self.scaling:
            return read_sums(q, pool_sums(k, v) / k.shape[-2], normalised=False)
        sums = pool_sums(k, v, feature="exponential")
        return read_sums(q, sums / sums[..., -1:], feature="softmax", normalised=False)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.scaling:
            return self._fading(q, k, v)[0]
        out: Tensor = ChunkedAttention.apply(*self._counted(q, k, v))  # type: ignore[no-untyped-call]
        return out.view(v.shape)

    @staticmethod
    def _fading(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the past as decayed attention, and Σ_j e^{k_j − m} v_j with the level m after the last token."""
        queries, keys, log_decay = _Past.apply(q, k)  # type: ignore[no-untyped-call]
        return decayed_attention(queries, keys, v, log_decay)

    @staticmethod
    def _counted(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Operator]:
        """Scaling over the past as linear attention whose query t is divided by t."""
        seen = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=compute_dtype(q))
        queries, keys, values = (x.flatten(0, 1) for x in (q / seen[:, None], k, v))
        return queries, keys, values, Operator(Identity(), normalised=False)

    @torch.no_grad()
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> tuple[Tensor, State]:
        """The fast path, which has the sums at its end; their normaliser is one more pass over the keys."""
        self.require_decoding()
        self._check(q, k)
        if self.scaling:
            walked = walk_slabs(*self._counted(q, k, v))
            sums = walked.after.state.view(*q.shape[:2], q.shape[3], v.shape[3])
            return walked.out.view(v.shape), (sums, sums.new_full((1,), q.shape[2]))
        out, sums = self._fading(q, k, v)
        level = k.to(sums.dtype).amax(2)
        normaliser = (k.to(sums.dtype) - level[:, :, None]).exp_().sum(2)
        return out, (sums, normaliser, level)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """Sums of e^k·v ``[B, H, D, M]`` and of e^k ``[B, H, D]``, and the level of both, the largest k so far.

        For ``scaling`` the sums of k·v, and the number of tokens ``[1]`` for all. In fp32 or fp64.
        """
        wide, size = torch.promote_types(dtype, torch.float32), (batch, self.geometry.heads, self.geometry.key_dim)
        sums = torch.zeros(*size, self.geometry.value_dim, device=device, dtype=wide)
        if self.scaling:
            return sums, sums.new_zeros(1)
        return sums, sums.new_zeros(size), sums.new_full(size, -torch.inf)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: State, **extras: Tensor) -> tuple[Tensor, State]:
        """One token: q, k ``[B, H, D]``, v ``[B, H, M]``."""
        dtype = state[0].dtype
        out, after = self._advance(state, q.to(dtype), k.to(dtype), v.to(dtype))
        return out.to(v.dtype), after

    def _advance(self, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        """Add a token to the sums, and read them."""
        if self.scaling:
            sums, seen = state[0] + k[..., None] * v[..., None, :], state[1] + 1
            return (q[..., None, :] @ sums).squeeze(-2) / seen, (sums, seen)
        before, normaliser, level = state
        # any level would give the same: no gradient goes through it
        highest = torch.maximum(level, k).detach()
        kept, taken = (level - highest).exp(), (k - highest).exp()
        sums = kept[..., None] * before + taken[..., None] * v[..., None, :]
        normaliser = kept * normaliser + taken
        out = (q.softmax(-1) / normaliser)[..., None, :] @ sums
        return out.squeeze(-2), (sums, normaliser, highest)

    def _check(self, q: Tensor, k: Tensor) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before)."""
        if self.causal and q.shape[-2] != k.shape[-2]:
            raise UsageError(f"efficient, causal: {q.shape[-2]} queries and {k.shape[-2]} keys, but as many are needed")

    def flops(self, cell: Cell) -> int:
        """Matrix products: 4DM per token forward and 8DM backward.

        Causal: chunks of at most C tokens, C(2D + 2M) + 4DM forward and C(6D + 4M) + 10DM backward. With softmax every
        channel has a decay: only pairs of different tokens are multiplied, in blocks, half of the products with D.
        """
        key_dim, value_dim = cell.head_dim, cell.value_dim
        forward, backward = 4 * key_dim * value_dim, 8 * key_dim * value_dim
        if cell.causal:
            chunk = min(CHUNK, cell.length)
            pairs = (2 * chunk if self.scaling else chunk - 1) * key_dim
            forward += pairs + 2 * chunk * value_dim
            backward += 3 * pairs + 4 * chunk * value_dim + 2 * key_dim * value_dim
        per_token = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[cell.pass_]
        return cell.batch * cell.heads * cell.length * per_token

    def decode_flops(self, cell: Cell) -> int:
        """4DM for writing and reading the sums."""
        return 4 * cell.batch * cell.heads * cell.head_dim * cell.value_dim

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v read and o written once, and the like backward; the state can stay on the chip."""
        return streaming_bytes(cell)

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """D(M + 2) numbers per head, or DM and one for all: independent of ``length``."""
        if not self.causal:
            return None
        return sum(part.nbytes for part in self.initial_state(1, torch.device("cpu"), dtype))


class _Past(torch.autograd.Function):
    """``apply(q, k)``: what makes decayed linear attention of softmax over the past, each ``[B, H, N, D]``.

    With the level m_t = max_{j≤t} k_j of every channel and z_t = Σ_{j≤t} e^{k_j − m_t} ≥ 1: queries softmax(q_t)/z_t,
    keys e^{k_t − m_t}, log decays m_{t−1} − m_t. The output does not depend on the levels, which have no gradient.
    Sums over the past are made in fp64: in fp32 their rounding would grow with the number of tokens.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(q)
        keys, log_decay, sums = (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(3))
        for walk in _walks(k):
            space, level, total = Space(k.new_empty(0, dtype=torch.float64)), None, None
            for run in walk:
                x = run.read(k, torch.float64)
                levels, each = space.take("level", run, *x.shape[1:])
                levels.copy_(x)
                before = x[0] if level is None else level
                level = max_scan_(x.new_zeros(()), each, before)
                fall = torch.cat((before[None], levels[:-1])).sub_(levels)
                run.write(log_decay, fall)
                decays, each_decay = space.take("decay", run, *x.shape[1:])
                torch.exp(fall, out=decays)
                entering, each_entering = space.take("sum", run, *x.shape[1:])
                torch.sub(x, levels, out=entering).exp_()
                run.write(keys, entering)
                total = scan_(each_decay, each_entering, torch.zeros_like(before) if total is None else total)
                run.write(sums, entering)
        ctx.save_for_backward(q, keys, log_decay, sums)
        ctx.mark_non_differentiable(log_decay)
        return q.to(dtype).softmax(-1).div_(sums), keys, log_decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, queries_grad: Tensor, keys_grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        q, keys, log_decay, sums = ctx.saved_tensors
        k_grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        weights = q.to(sums.dtype).softmax(-1)
        of_weights = queries_grad / sums
        of_sums = (weights / sums).mul_(of_weights).neg_()
        for walk in _walks(q):
            space, after = Space(q.new_empty(0, dtype=torch.float64)), None
            for run in reversed(walk):
                fall = run.read(log_decay, torch.float64)
                decays, each_decay = space.take("decay", run, *fall.shape[1:])
                torch.exp(fall, out=decays)
                grads, each = space.take("grad", run, *fall.shape[1:])
                grads.copy_(run.read(of_sums, torch.float64))
                after = scan_gradient_(each_decay, each, torch.zeros_like(grads[0]) if after is None else after)
                grads.add_(run.read(keys_grad, torch.float64))
                run.write(k_grad, grads.mul_(run.read(keys, torch.float64)))
        of_weights.sub_(torch.linalg.vecdot(weights, of_weights)[..., None])
        return of_weights.mul_(weights).to(q.dtype), k_grad


def _walks(x: Tensor) -> list[list[Run]]:
    """For the heads that are walked together, their runs."""
    batch, heads, length, lanes = x.shape
    parts = head_parts(batch, heads, lanes, x.device)
    return [list(runs(part, length, lanes, ELEMENTS, x.device)) for part in parts]
