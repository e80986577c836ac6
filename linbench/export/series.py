"""The measured cells as other benchmark tools count them: a name, its parameters, and samples in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linbench.record import Environment, Record, Run, Speed

UNSAID: dict[str, Any] = {"target": None, "hyperparameters": {}, "inputs_target": None, "device_parameters": {}}
"""Fields of a cell that a name leaves out where they have these values."""


@dataclass(frozen=True)
class Timed:
    """One cell that was timed."""

    record: Record
    environment: Environment | None
    parameters: dict[str, str]
    """All of the cell but its mechanism, as words."""
    samples_s: NDArray[np.float64]
    """Of all rounds."""

    @property
    def speed(self) -> Speed:
        """The first of its times that counts, for what all of them have in common."""
        return next(iter(self.record.timings.values()))

    @property
    def name(self) -> str:
        """``mechanism[length=128,…]``: the same for the same cell."""
        return f"{self.record.cell.mechanism}[{','.join(f'{key}={value}' for key, value in self.parameters.items())}]"


def timed(records: Sequence[Record], runs: Sequence[Run]) -> list[Timed]:
    """The cells with a time, in the order of the records."""
    environments = {run.run: run.environment for run in runs}
    return [
        Timed(
            record,
            environments.get(record.run),
            _parameters(record),
            np.concatenate(record.samples_ms) / 1e3,
        )
        for record in records
        if record.timings
    ]


def _parameters(record: Record) -> dict[str, str]:
    found = record.cell.model_dump(mode="json", by_alias=True, exclude={"mechanism"})
    return {
        name: json.dumps(value, sort_keys=True) if isinstance(value, dict) else str(value)
        for name, value in found.items()
        if name not in UNSAID or value != UNSAID[name]
    }
