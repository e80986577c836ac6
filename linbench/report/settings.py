"""What the records of a report are told apart by: the setting, within which times compare, and the series, a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from linbench.cell import Cell, Scalar

EXACT = "softmax"
"""The mechanism whose implementations are the exact attention that all others are held against."""
_PASSES = ("forward", "backward", "forward_backward", "prefill", "decode")


@dataclass(frozen=True)
class Setting:
    """What must be equal for two latencies to be comparable, the length aside."""

    machine: str
    device: str
    dtype: str
    causal: bool
    pass_: str
    batch: int
    heads: int
    head_dim: int
    value_dim: int

    @cached_property
    def order(self) -> tuple[str, str, str, tuple[int, ...], bool, int]:
        """Sorts settings: machine, device, dtype and shape first, so that neighbours differ by mask and pass."""
        shape = (self.batch, self.heads, self.head_dim, self.value_dim)
        return (self.machine, self.device, self.dtype, shape, self.causal, _PASSES.index(self.pass_))

    @property
    def shape(self) -> str:
        """The sizes that are not the length, in words."""
        return f"batch {self.batch}, {self.heads} heads, key width {self.head_dim}, value width {self.value_dim}"


@dataclass(frozen=True)
class Series:
    """A line of a figure: a mechanism with its hyperparameters in one implementation."""

    mechanism: str
    target: str | None
    hyperparameters: str
    """Canonical JSON."""
    implementation: str

    @cached_property
    def order(self) -> tuple[bool, str, str, list[tuple[str, str]], str]:
        """Sorts series: exact attention first, numbers by size."""
        values = [(name, _sortable(value)) for name, value in self.parameters.items()]
        return (self.mechanism != EXACT, self.mechanism, self.target or "", values, self.implementation)

    @cached_property
    def parameters(self) -> dict[str, Scalar]:
        """The hyperparameters by name."""
        loaded: dict[str, Scalar] = json.loads(self.hyperparameters)
        return loaded


def setting_of(cell: Cell, machine: str) -> Setting:
    """The setting of a cell on a machine."""
    device = _call(cell.device, cell.device_parameters)
    shape = (cell.batch, cell.heads, cell.head_dim, cell.value_dim)
    return Setting(machine, device, cell.dtype, cell.causal, cell.pass_, *shape)


def series_of(cell: Cell) -> Series:
    """The series of a cell."""
    return Series(cell.mechanism, cell.target, hyperparameters_of(cell), cell.implementation)


def hyperparameters_of(cell: Cell) -> str:
    """The hyperparameters of a cell as canonical JSON."""
    return _canonical(tuple((name, type(value), value) for name, value in cell.hyperparameters.items()))


@lru_cache(maxsize=4096)
def _canonical(named: tuple[tuple[str, type, Scalar], ...]) -> str:
    """The types are there to tell 1 from 1.0 and from true, which are equal."""
    return json.dumps({name: value for name, _, value in named}, sort_keys=True)


def inputs_of(cell: Cell) -> str:
    """The family of inputs with its parameters: ``gaussian(scale=2)``."""
    name = _call(cell.inputs, cell.inputs_parameters)
    return f"{name} [{cell.inputs_target}]" if cell.inputs_target else name


def _call(name: str, parameters: dict[str, Scalar]) -> str:
    inside = ", ".join(f"{key}={value}" for key, value in parameters.items() if value is not None)
    return f"{name}({inside})" if inside else name


def _sortable(value: Scalar) -> str:
    return f"{value:024.6f}" if isinstance(value, (int, float)) else str(value)
