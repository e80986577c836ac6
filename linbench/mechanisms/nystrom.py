"""Nyströmformer: softmax attention through landmarks and a pseudo-inverse (2102.03902)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Description, Geometry, Mechanism, streaming_bytes
from linbench.mechanisms.claims import Claims, Convergence, ExactLimit
from linbench.mechanisms.linformer import pool
from linbench.mechanisms.softmax import attention_flops


class Nystrom(Mechanism):
    """``o = softmax(s·q·K̄ᵀ)·Z·softmax(s·Q̄·kᵀ)·v``, ``Z ≈ A⁺``, ``A = softmax(s·Q̄·K̄ᵀ)``, s = D^-1/2 (equation 13).

    The landmarks Q̄, K̄ are the means of ``landmarks`` consecutive segments, as many for queries as for keys. Where that
    number does not divide N, the first segments hold one token more than the others; there are min(N, N_k) at most.

    Z is found in fp32 at least, with the norms of each matrix: codes that take the largest norm of a batch converge
    later. Fewer landmarks than tokens make A ill-conditioned, and stopping early regularises: the exact pseudo-inverse
    is far worse at random inputs. With N landmarks the operator is softmax, but only as far as Z has converged: that
    takes 20 iterations and more.

    Args:
        landmarks: m.
        iterations: of Z ← ¼Z(13I − AZ(15I − AZ(7I − AZ))) from Z₀ = Aᵀ/(‖A‖₁‖A‖_∞) (equation 14).
        inverse: ``iterative``, or ``exact`` by singular values.
        convolution: taps of a learned convolution of the values over tokens, one kernel per head, that is added to the
            output (the skip connection of section 3.3); 0 for none, which leaves the approximation of softmax alone.
    """

    description: ClassVar[Description] = Description(
        summary="softmax(q·K̄ᵀ)·softmax(Q̄·K̄ᵀ)⁺·softmax(Q̄·kᵀ)·v, landmarks Q̄, K̄ are means of segments",
        kind="approximator",
        causal_forms=(False,),
        paper="Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
        arxiv="2102.03902",
        year=2021,
        time="N",
        memory="N",
    )
    claims: ClassVar[Claims] = Claims(converges=Convergence("landmarks", (8, 16, 32, 64), inputs="smooth"))

    def __init__(
        self,
        geometry: Geometry,
        landmarks: Annotated[int, Field(ge=1)] = 64,
        iterations: Annotated[int, Field(ge=0)] = 6,
        inverse: Literal["iterative", "exact"] = "iterative",
        convolution: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__(geometry)
        if convolution and convolution % 2 == 0:
            raise UsageError(f"nystrom.convolution={convolution}: the taps of a centred convolution are odd, or 0")
        self.landmarks, self.iterations, self.inverse = landmarks, iterations, inverse
        self.taps: torch.nn.Parameter | None = None
        if convolution:
            generator = torch.Generator().manual_seed(geometry.seed)
            drawn = torch.rand(geometry.heads, convolution, generator=generator, dtype=torch.float64)
            self.taps = torch.nn.Parameter(((2 * drawn - 1) * convolution**-0.5).float())
            """``[H, taps]``, uniform within taps^-1/2."""

    def reference(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, **extras: Tensor) -> Tensor:
        """The three matrices of the formula; see :meth:`Mechanism.reference`."""
        self._check(q, k)
        count = min(self.landmarks, q.shape[-2], k.shape[-2])
        q_means, k_means = (averaging(x.shape[-2], count, x) @ x for x in (q, k))
        to_landmarks, between, from_landmarks = (
            torch.softmax(a @ b.mT * q.shape[-1] ** -0.5, -1)
            for a, b in ((q if rows is None else q[..., rows, :], k_means), (q_means, k_means), (q_means, k))
        )
        output: Tensor = to_landmarks @ (self._inverse(between) @ (from_landmarks @ v))
        if self.taps is not None:
            taps, length = self.taps.to(v), v.shape[-2]
            places = torch.arange(length, device=v.device) if rows is None else rows
            for tap in range(taps.shape[-1]):
                source = places + tap - taps.shape[-1] // 2
                inside = ((source >= 0) & (source < length))[:, None]
                output = output + taps[:, tap, None, None] * (v[..., source.clamp(0, length - 1), :] * inside)
        return output

    def forward_torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Landmarks by means of views, and the small product first: nothing larger than N·m."""
        self._check(q, k)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, values = q.to(wide), k.to(wide), v.to(wide)
        count = min(self.landmarks, q.shape[-2], k.shape[-2])
        q_means, k_means = pool(q * q.shape[-1] ** -0.5, count), pool(k, count)
        between = torch.softmax(q_means @ k_means.mT, -1)
        summary = self._inverse(between) @ (torch.softmax(q_means @ k.mT, -1) @ values)
        output = torch.softmax(q @ (k_means * q.shape[-1] ** -0.5).mT, -1) @ summary
        if self.taps is not None:
            output = output + self._convolved(values)
        return output.to(v.dtype)

    def _inverse(self, between: Tensor) -> Tensor:
        """Z of A ``[B, H, m, m]``."""
        if self.inverse == "exact":
            exact: Tensor = torch.linalg.pinv(between)
            return exact
        return iterated_inverse(between, self.iterations)

    def _convolved(self, v: Tensor) -> Tensor:
        """Each head's kernel over the tokens, zeros beyond the ends."""
        assert self.taps is not None
        batch, heads, _, width = v.shape
        # a row per (batch, head, column), a group per head: the kernel is the same for its columns
        streams = v.permute(0, 3, 1, 2).reshape(batch * width, heads, -1)
        taps = self.taps.to(v)[:, None]
        convolved = torch.nn.functional.conv1d(streams, taps, padding=taps.shape[-1] // 2, groups=heads)
        return convolved.view(batch, width, heads, -1).permute(0, 2, 3, 1)

    def _check(self, q: Tensor, k: Tensor) -> None:
        if self.taps is not None and q.shape[-2] != k.shape[-2]:
            raise UsageError(
                f"nystrom with a convolution needs as many keys as queries, got {k.shape[-2]} and {q.shape[-2]}"
            )

    @classmethod
    def exact_limit(cls, length: int) -> ExactLimit:
        """A landmark per token and the pseudo-inverse itself."""
        return ExactLimit({"landmarks": length, "inverse": "exact"}, tolerance=1e-8)

    def flops(self, cell: Cell) -> int:
        """N·m pairs to and from the landmarks, m² between them, and 8·m³ an iteration; three times that backward.

        Of the pairs, forward 2·(D + M) each and twice; between landmarks 2·D, and 2·M for Z times the summary.
        """
        count = min(self.landmarks, cell.length)
        heads = cell.batch * cell.heads
        pairs = attention_flops(cell, 2 * cell.length * count + count**2)
        # a singular value decomposition is about 22·m³ operations
        inverse = 22 * count**3 if self.inverse == "exact" else 8 * count**3 * self.iterations
        taps = 0 if self.taps is None else 2 * cell.length * cell.value_dim * self.taps.shape[-1]
        passes = {"forward": 1, "backward": 2, "forward_backward": 3}[cell.pass_]
        return pairs + passes * heads * (inverse + taps)

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and o once."""
        return streaming_bytes(cell)


def iterated_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Newton–Schulz iteration of third order towards the pseudo-inverse, ``[..., m, m]`` (Razavi et al. 2014)."""
    magnitudes = matrix.abs()
    norms = magnitudes.sum(-2).amax(-1) * magnitudes.sum(-1).amax(-1)
    inverse = matrix.mT / norms[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse


def averaging(length: int, segments: int, like: Tensor) -> Tensor:
    """The matrix of the segments' means, ``[segments, length]``."""
    size, longer = divmod(length, segments)
    sizes = [size + (segment < longer) for segment in range(segments)]
    counts = torch.tensor(sizes, device=like.device)
    segment = torch.arange(segments, device=like.device)
    inside = segment[:, None] == segment.repeat_interleave(counts)
    return inside.to(like.dtype) / counts[:, None]
