"""Keys and values of past tokens in buffers that are there already: a step writes one row, and copies nothing.

A state is the buffers and a count of tokens. A step writes a row that the state does not need and gives back the same
buffers with a count of one more. So a step may be taken again from the same state: it writes the same row again, and
only the state that it gave before is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 64
"""Tokens for which there is room behind those of a prefill."""


@dataclass(frozen=True)
class Cache:
    """All tokens so far, in the first ``count`` rows."""

    key_rows: Tensor
    """``[B, H, R, D]``: R is what there is room for."""
    value_rows: Tensor
    """``[B, H, R, M]``."""
    count: int = 0

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, room: int = ROOM) -> Cache:
        """Copies of keys ``[B, H, N, D]`` and values ``[B, H, N, M]``, with room for ``room`` more."""
        count = keys.shape[2]
        return cls(_longer(keys, count + room), _longer(values, count + room), count)

    @property
    def keys(self) -> Tensor:
        """``[B, H, count, D]``, a view."""
        return self.key_rows[:, :, : self.count]

    @property
    def values(self) -> Tensor:
        """``[B, H, count, M]``, a view."""
        return self.value_rows[:, :, : self.count]

    def held(self) -> tuple[Tensor, ...]:
        """What the tokens so far take: the rows that are filled."""
        return self.keys, self.values

    def append(self, key: Tensor, value: Tensor) -> Cache:
        """With one more token, ``[B, H, D]`` and ``[B, H, M]``; buffers that are full move to half as much again."""
        rows = self.key_rows, self.value_rows
        if self.count == self.key_rows.shape[2]:
            room = self.count + self.count // 2 + ROOM
            rows = _longer(self.keys, room), _longer(self.values, room)
        for buffer, row in zip(rows, (key, value), strict=True):
            buffer[:, :, self.count] = row
        return Cache(*rows, self.count + 1)


@dataclass(frozen=True)
class Ring:
    """The last ``kept`` tokens, and the first ``pinned`` ones for good.

    Token t lies in row t while t < ``pinned``, and then in row ``pinned + (t − pinned) mod S``, where S > ``kept`` is
    the number of the other rows: what the next token overwrites is no longer needed.
    """

    key_rows: Tensor
    """``[B, H, pinned + S, D]``."""
    value_rows: Tensor
    """``[B, H, pinned + S, M]``."""
    kept: int
    pinned: int = 0
    count: int = 0

    @property
    def size(self) -> int:
        """S."""
        return self.key_rows.shape[2] - self.pinned

    @property
    def filled(self) -> int:
        """How many rows have been written to: the first ones."""
        return min(self.count, self.pinned + self.size)

    def row(self, token: int) -> int:
        """Where a token lies, or will."""
        return token if token < self.pinned else self.pinned + (token - self.pinned) % self.size

    def held(self) -> tuple[Tensor, ...]:
        """What the pinned and the kept tokens take."""
        last = range(max(self.count - self.kept, min(self.pinned, self.count)), self.count)
        rows = [*range(min(self.pinned, self.count)), *(self.row(token) for token in last)]
        return self.key_rows[:, :, rows], self.value_rows[:, :, rows]

    def append(self, key: Tensor, value: Tensor) -> Ring:
        """With one more token, ``[B, H, D]`` and ``[B, H, M]``."""
        row = self.row(self.count)
        self.key_rows[:, :, row] = key
        self.value_rows[:, :, row] = value
        return self._counting(self.count + 1)

    def extended(self, keys: Tensor, values: Tensor) -> Ring:
        """An empty ring with the tokens of keys ``[B, H, N, D]`` and values ``[B, H, N, M]`` that it keeps."""
        tokens, first = keys.shape[2], min(self.pinned, keys.shape[2])
        last = range(max(tokens - self.kept, first), tokens)
        rows = torch.tensor([self.row(token) for token in last], dtype=torch.int64, device=keys.device)
        for buffer, x in ((self.key_rows, keys), (self.value_rows, values)):
            buffer[:, :, :first] = x[:, :, :first]
            buffer[:, :, rows] = x[:, :, last.start :].to(buffer.dtype)
        return self._counting(tokens)

    def _counting(self, count: int) -> Ring:
        return Ring(self.key_rows, self.value_rows, self.kept, self.pinned, count)


def _longer(x: Tensor, rows: int) -> Tensor:
    """A new ``[B, H, rows, ·]`` that begins with the tokens of ``x``."""
    longer = x.new_empty(*x.shape[:2], rows, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer
