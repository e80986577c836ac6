"""The processes of a gate: blocks of four, and what became of every cell in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from linbench.cell import Cell
from linbench.gate.statistics import Block, Side, order
from linbench.gate.trees import Tree
from linbench.protocol import Measure, Outcome
from linbench.record import MEASURED, Status
from linbench.sweep import measure_request

SIDES: tuple[Side, Side] = ("base", "head")
STARTING_S = 60.0
"""For a process to import everything."""


@dataclass
class Watched:
    """A cell, and all that the processes said of it."""

    cell: Cell
    floor_blocks: list[Block] = field(default_factory=list)
    """Of base on both sides."""
    blocks: list[Block] = field(default_factory=list)
    again: list[Block] = field(default_factory=list)
    """Of a second look, alone."""
    dropped: int = 0
    """Blocks in which a process was disturbed."""
    memory_bytes: dict[Side, list[int]] = field(default_factory=lambda: {"base": [], "head": []})
    failures: dict[Side, str] = field(default_factory=dict)
    """Side -> the status and the reason of a cell that has no time."""


@dataclass
class Session:
    """Two trees, and how their cells are measured."""

    base: Tree
    head: Tree
    measures: dict[str, Measure]
    memory_limit_bytes: int
    time_limit_s: float
    seed: int
    spent_processes: int = 0

    def run_blocks(self, watched: Sequence[Watched], count: int, kind: str = "blocks") -> None:
        """Measure blocks of four processes over the cells that have not failed.

        Args:
            kind: the list of a cell that they go to: ``floor_blocks`` (base on both sides), ``blocks`` or ``again``.

        Raises:
            UnusableError: a tree gives no answers.
        """
        for sides in order(count, self.seed + self.spent_processes):
            going = [one for one in watched if not one.failures]
            if not going:
                return
            found: dict[Side, list[dict[str, float | None]]] = {"base": [], "head": []}
            for side in sides:
                tree = self.head if side == "head" and kind != "floor_blocks" else self.base
                found[side].append(self._process(tree, side, going))
            for one in going:
                self._add(one, found, kind)

    def _process(self, tree: Tree, side: Side, going: Sequence[Watched]) -> dict[str, float | None]:
        """Key of a cell -> its median in milliseconds, None where it was disturbed."""
        self.spent_processes += 1
        shuffled = list(going)
        random.Random(self.seed * 1_000_003 + self.spent_processes).shuffle(shuffled)
        requests = [self._request(one.cell) for one in shuffled]
        answers = tree.answers(requests, STARTING_S + self.time_limit_s * len(requests))
        medians: dict[str, float | None] = {}
        for one, answer in zip(shuffled, answers, strict=True):
            outcome = Outcome.model_validate(answer)
            medians[one.cell.key] = _median_ms(outcome)
            if outcome.status not in MEASURED:
                one.failures.setdefault(side, f"{outcome.status}: {outcome.reason}")
            if outcome.memory is not None:
                one.memory_bytes[side].append(outcome.memory.increment_bytes)
        return medians

    def _request(self, cell: Cell) -> dict[str, Any]:
        request = measure_request(cell, self.measures, self.memory_limit_bytes)
        plain = request.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {"kind": "measure", "request": plain, "limit_s": self.time_limit_s}

    @staticmethod
    def _add(one: Watched, found: dict[Side, list[dict[str, float | None]]], kind: str) -> None:
        (first, second), (third, fourth) = ([process.get(one.cell.key) for process in found[side]] for side in SIDES)
        if first is None or second is None or third is None or fourth is None:
            one.dropped += not one.failures
            return
        getattr(one, kind).append(Block((first, second), (third, fourth)))


def _median_ms(outcome: Outcome) -> float | None:
    """None for a time that others disturbed, or none at all."""
    if outcome.status is not Status.OK or outcome.speed is None:
        return None
    return median(outcome.speed.samples_ms)
