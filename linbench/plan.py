"""Configuration -> list of cells, and what they will cost. Pure: no device, no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from linbench.cell import Cell, Scalar
from linbench.config import Choice, Config
from linbench.estimate import estimate_seconds
from linbench.prospect import Prospect, Rates
from linbench.record import Status


class Skip(NamedTuple):
    """A cell that will not be started: the status and the reason that its record gets."""

    status: Literal[Status.UNSUPPORTED, Status.TIMEOUT, Status.OOM]
    reason: str


class Step(NamedTuple):
    """A cell of the plan with what is known before it runs."""

    cell: Cell
    prospect: Prospect
    estimated_s: float
    """Of the first round, with every measure."""
    skip: Skip | None
    repeat_s: float = 0.0
    """Of a further round, which only times."""


def expand(config: Config) -> list[Cell]:
    """Every cell of the configuration. Short lengths come first, and the mechanisms take turns at each length.

    A shard takes every ``shard.count``-th cell, so that each shard sees all lengths.
    """
    axes = config.axes
    shapes = itertools.product(
        axes.length,
        axes.pass_,
        axes.causal,
        axes.dtype,
        axes.batch,
        axes.heads,
        axes.head_dim,
        axes.value_dim,
        axes.seed,
    )
    cells = []
    for length, pass_, causal, dtype, batch, heads, head_dim, value_dim, seed in sorted(shapes, key=lambda s: s[0]):
        for device, inputs, mechanism, implementation in itertools.product(
            _variants(config.devices), _variants(config.inputs), _variants(config.mechanisms), axes.implementation
        ):
            cell = Cell(
                mechanism=mechanism.name,
                target=_foreign(mechanism.target),
                hyperparameters=mechanism.parameters,
                implementation=implementation,
                length=length,
                batch=batch,
                heads=heads,
                head_dim=head_dim,
                value_dim=value_dim or head_dim,
                dtype=dtype,
                causal=causal,
                pass_=pass_,
                inputs=inputs.name,
                inputs_target=_foreign(inputs.target),
                inputs_parameters=inputs.parameters,
                device=device.name,
                device_parameters=device.parameters,
                seed=seed,
            )
            cells.append(cell)
    return cells[config.shard.index :: config.shard.count]


def _foreign(target: str | None) -> str | None:
    """A target that has to be named in the cell, since its name alone does not lead to it."""
    return None if target is None or target.startswith("linbench.") else target


class _Variant(NamedTuple):
    name: str
    target: str | None
    parameters: dict[str, Scalar]


def _variants(choices: Iterable[Choice]) -> list[_Variant]:
    return [
        _Variant(choice.name, choice.target, dict(zip(choice.parameters, values, strict=True)))
        for choice in choices
        for values in itertools.product(*choice.parameters.values())
    ]


def foresee(
    cells: Sequence[Cell],
    prospects: Sequence[Prospect],
    rates: Mapping[str, Rates],
    *,
    measures: dict[str, dict[str, Scalar]],
    time_limit_s: float,
    memory_limit_bytes: int | None,
) -> list[Step]:
    """Join cells with what is known of them; decide what will not be started, and why.

    Args:
        rates: of each device, by its name.
    """
    steps = []
    for cell, prospect in zip(cells, prospects, strict=True):
        pace = rates.get(cell.device, Rates())
        seconds = estimate_seconds(cell, prospect, pace, measures)
        skip = _skip(cell, prospect, seconds, time_limit_s, memory_limit_bytes)
        again = {"speed": measures["speed"]} if "speed" in measures else {}
        steps.append(Step(cell, prospect, seconds, skip, estimate_seconds(cell, prospect, pace, again)))
    return steps


def _skip(
    cell: Cell, prospect: Prospect, seconds: float, time_limit_s: float, memory_limit_bytes: int | None
) -> Skip | None:
    if prospect.unsupported:
        return Skip(Status.UNSUPPORTED, prospect.unsupported)
    if memory_limit_bytes is not None and inputs_bytes(cell) > memory_limit_bytes:
        needed, limit = inputs_bytes(cell) / 2**30, memory_limit_bytes / 2**30
        return Skip(Status.OOM, f"not started: q, k, v alone take {needed:.3g} GiB, the limit is {limit:.3g} GiB")
    if seconds > time_limit_s:
        return Skip(Status.TIMEOUT, f"not started: estimated {seconds:.0f} s, time_limit_s is {time_limit_s:g}")
    return None


def inputs_bytes(cell: Cell) -> int:
    """Bytes of q, k and v."""
    return cell.element_bytes * cell.batch * cell.heads * cell.length * (2 * cell.head_dim + cell.value_dim)


def backstop(failed: Cell, status: Status, reason: str, remaining: Iterable[Step]) -> Iterator[tuple[str, Skip]]:
    """Cells that need not be tried: the same as one that ran out of time or memory, but longer.

    Yields:
        the key of each such cell, and what its record will say.
    """
    if status not in (Status.OOM, Status.TIMEOUT):
        return
    series = failed.series()
    for step in remaining:
        if step.cell.length > failed.length and step.cell.series() == series and step.skip is None:
            told = f"not started: at {failed.length:,} tokens it ended in {status}: {reason}"
            yield step.cell.key, Skip(status, told)
