"""What mechanisms without a non-causal form have in common, and those of them whose state never grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from linbench.cell import Cell
from linbench.errors import UsageError
from linbench.mechanisms.base import Mechanism, streaming_bytes
from linbench.mechanisms.cores.chunked import compute_dtype
from linbench.mechanisms.cores.segments import State, recurrent


class CausalOnly(Mechanism):
    """A causal form alone, with as many keys as queries, and gates per token."""

    def check(self, q: Tensor, k: Tensor, extras: dict[str, Tensor]) -> None:
        """Refuse what has no operator (for a cell, ``unsupported`` says so before).

        Raises:
            UsageError: not causal, as many queries as keys are needed, or an extra is missing or has another shape.
        """
        name = type(self).__name__
        if not self.causal:
            raise UsageError(f"{name} has no non-causal form")
        if q.shape[-2] != k.shape[-2]:
            raise UsageError(f"{name}: {q.shape[-2]} queries and {k.shape[-2]} keys, but as many are needed")
        for key, gate in self.gates().items():
            shape = q.shape[:3] if gate.width is None else (*q.shape[:3], gate.width)
            if key not in extras or extras[key].shape != shape:
                raise UsageError(f"{name} needs the extra '{key}' of shape {list(shape)}")

    def min_bytes(self, cell: Cell) -> int:
        """q, k, v and the extras read and o written once, and the like backward; the state can stay on the chip."""
        elements = 0.0
        for gate in self.gates().values():
            size = max(cell.element_bytes, 4) if gate.precise else cell.element_bytes
            elements += (gate.width or 1) * size / cell.element_bytes
        return streaming_bytes(cell, elements)


class Recurrence(CausalOnly):
    """The walk of a reference, and a state of D × M per head unless a subclass says otherwise.

    Inputs below fp64 are computed in fp32, on every device, and the output is rounded once.
    """

    sequential_reference: ClassVar[bool] = True

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Learned weights, as the recurrence takes them."""
        return ()

    def walked(
        self,
        advance: Callable[..., tuple[Tensor, State]],
        start: State | None,
        rows: Tensor | None,
        *streams: Tensor,
    ) -> Tensor:
        """A reference: ``advance(state, *token, *weights)`` token by token, up to the last of ``rows``.

        Args:
            advance: gives the output of a token and the state after it.
            start: before the first token; :meth:`initial_state` when None.
            rows: as for :meth:`reference`.
            streams: q, k, v and whatever else belongs to tokens, ``[B, H, N, …]``.
        """
        q, v = streams[0], streams[2]
        dtype = compute_dtype(v)
        tokens = q.shape[2] if rows is None else int(rows.max()) + 1
        start = (self.initial_state(q.shape[0], q.device, dtype),) if start is None else start
        cut = [x[:, :, :tokens].to(dtype) for x in streams]
        out, _ = recurrent(advance, start, cut, [x.to(dtype) for x in self.weights])
        return (out if rows is None else out[:, :, rows]).to(v.dtype)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The state before the first token: zeros ``[B, H, D, M]`` in fp32 or fp64."""
        shape = (batch, self.geometry.heads, self.geometry.key_dim, self.geometry.value_dim)
        return torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))

    def state_bytes(self, length: int, dtype: torch.dtype) -> int | None:
        """The size of :meth:`initial_state`, independent of ``length``."""
        return self.initial_state(1, torch.device("cpu"), dtype).nbytes if self.causal else None
