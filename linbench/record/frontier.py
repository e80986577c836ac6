"""The line of a frontier, and the probes behind it."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from linbench.cell import Cell
from linbench.record.base import SCHEMA_VERSION, Block, Status


class Probe(Block):
    """One attempt at a length: a process of its own that draws the inputs and calls the pass once."""

    length_tokens: int
    status: Status
    """``ok``: it ended within both limits."""
    reason: str | None = None
    peak_bytes: int | None = None
    """Highest level of the process above that before it built the mechanism: parameters, inputs and call together;
    null where it did not end, or the system does not tell."""
    elapsed_s: float


class Frontier(Block):
    """The longest sequence whose pass runs within a memory limit and a time limit, for one cell without its length."""

    kind: Literal["frontier"] = "frontier"
    schema_version: int = SCHEMA_VERSION
    run: str
    """Name of the run whose file holds this line."""
    time: str
    """When the search ended, UTC, ISO 8601."""
    cell: Cell
    """At the longest length that fits; at the shortest that was tried where none does."""
    code: str
    """Hash of the source that made the probes, as in a cell's record."""
    status: Status
    """What stopped the search: how the shortest failing length ended; ``unsupported`` where the mechanism or the inputs
    take no longer one; ``ok`` where the largest length of all still fits."""
    reason: str
    complete: bool
    """Whether the search came to its end; an interrupted one is gone on with by the same command."""
    longest_fitting_tokens: int | None = None
    shortest_failing_tokens: int | None = None
    largest_tokens: int
    """No length above this one was to be tried."""
    relative_gap: float
    """The search ends when the two lengths differ by no more than this share of the failing one."""
    memory_limit_bytes: int | None = None
    """Of a probe's process; null on CUDA, where all of the device's memory may be used."""
    time_limit_s: float
    """Of a probe, from its start to its end."""
    probes: list[Probe]
    """In the order in which they were made."""

    @model_validator(mode="after")
    def _bracket_is_that_of_the_probes(self) -> Frontier:
        fitting = [probe.length_tokens for probe in self.probes if probe.status is Status.OK]
        failing = [probe.length_tokens for probe in self.probes if probe.status is not Status.OK]
        if self.longest_fitting_tokens != max(fitting, default=None):
            raise ValueError("longest_fitting_tokens is not the longest probe that is ok")
        if self.shortest_failing_tokens != min(failing, default=None):
            raise ValueError("shortest_failing_tokens is not the shortest probe that is not ok")
        if fitting and failing and max(fitting) >= min(failing):
            raise ValueError("a length fits above one that does not")
        return self
