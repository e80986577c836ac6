"""Beside the paper: what a ``paper_*`` sweep measured, next to the numbers that the paper printed.

The shape is to be compared, not the size: papers timed whole models on the GPUs of their year, linbench times the
operator on the machine at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from linbench.cell import Scalar
from linbench.report.points import Point, Points
from linbench.report.published import BASED, LINFORMER_MEMORY, LINFORMER_SPEED, NYSTROM, REFORMER
from linbench.report.sections import Grid, Section
from linbench.report.units import MISSING, error, ratio, tokens

STORING = "math"
"""The implementation of exact attention that stores its probabilities, as those of the papers did."""


@dataclass(frozen=True)
class Paper:
    """A table or figure of a paper, and how a sweep's points answer it."""

    sweep: str
    heading: str
    notes: list[str]
    grids: Callable[[Sequence[Point]], list[Grid]]


def paper_sections(points: Points) -> list[Section]:
    """One section for every paper whose sweep is among the records."""
    sections = []
    runs = {record.run for record in points.current}
    for paper in PAPERS:
        # a run is named TIME-SWEEP-HASH
        own = {run for run in runs if f"-{paper.sweep}-" in run}
        mine = [p for p in points.by_inputs if any(record.run in own for record in p.records)] if own else []
        grids = paper.grids(mine) if mine else []
        if grids:
            sections.append(Section(paper.sweep, paper.heading, paper.notes, grids))
    return sections


def _linformer(points: Sequence[Point]) -> list[Grid]:
    quantities = (
        ("Speed-up over exact attention", _latency, LINFORMER_SPEED, "torch"),
        ("Memory saved (factor)", _memory, LINFORMER_MEMORY, STORING),
    )
    ranks = sorted({int(p.series.parameters["rank"] or 0) for p in points if p.series.mechanism == "linformer"})
    grids = []
    for caption, value, published, baseline in quantities:
        rows = []
        for length in _lengths(points):
            exact = _value(_in(points, baseline), value, length, "softmax")
            cells = [_pair(exact, _value(points, value, length, "linformer", rank=k)) for k in ranks]
            printed = [ratio(x) if (x := published.get(length, {}).get(k)) else MISSING for k in ranks]
            rows.append([tokens(length), *(f"{ours} / {theirs}" for ours, theirs in zip(cells, printed, strict=True))])
        grids.append(Grid(f"{caption}, here / paper", ["N", *(f"k = {k}" for k in ranks)], rows))
    return grids


def _nystrom(points: Sequence[Point]) -> list[Grid]:
    series = {
        "linformer-256": ("linformer", {"rank": 256}),
        "longformer-257": ("longformer", {"window": 256}),
        "nystrom-64": ("nystrom", {"landmarks": 64}),
        "nystrom-32": ("nystrom", {"landmarks": 32}),
    }
    quantities = (
        ("Time over that of exact attention", 1, _latency, "torch"),
        ("Memory over that of exact attention", 0, _memory, STORING),
    )
    grids = []
    for caption, which, value, baseline in quantities:
        rows = []
        for length in _lengths(points):
            exact = _value(_in(points, baseline), value, length, "softmax")
            row = [tokens(length)]
            for name, (mechanism, parameters) in series.items():
                ours = _pair(_value(points, value, length, mechanism, **parameters), exact)
                printed = NYSTROM.get(length)
                theirs = ratio(printed[name][which] / printed["transformer"][which]) if printed else MISSING
                row.append(f"{ours} / {theirs}")
            rows.append(row)
        grids.append(Grid(f"{caption}, here / paper", ["N", *series], rows))
    return grids


def _performer(points: Sequence[Point]) -> list[Grid]:
    grids = []
    for inputs in sorted({p.inputs or "" for p in points}):
        here = [p for p in points if p.inputs == inputs and p.series.mechanism == "performer"]
        variants = sorted({(str(p.series.parameters["kernel"]), bool(p.series.parameters["orthogonal"])) for p in here})
        names = [f"{kernel}, {'orthogonal' if orthogonal else 'independent'}" for kernel, orthogonal in variants]
        sizes = sorted({int(p.series.parameters["features"] or 0) for p in here})
        output, kernels = [], []
        for features in sizes:
            found = [_matching(here, features=features, kernel=k, orthogonal=o) for k, o in variants]
            output.append([str(features), *(_mean_error(p) for p in found)])
            kernels.append([str(features), *(_kernel(p) for p in found)])
        grids.append(Grid(f"Relative error of the output, {inputs} inputs", ["m", *names], output))
        caption = f"Relative mean squared error of the kernel, measured / closed form for independent rows, {inputs}"
        grids.append(Grid(f"{caption} inputs", ["m", *names], kernels))
    return grids


def _reformer(points: Sequence[Point]) -> list[Grid]:
    grids = []
    for inputs in sorted({p.inputs or "" for p in points}):
        here = [p for p in points if p.inputs == inputs and p.series.mechanism == "reformer"]
        rounds = sorted({int(p.series.parameters["rounds"] or 0) for p in here})
        rows = []
        for count in rounds:
            judged = [block.target_error for p in _matching(here, rounds=count) for block in p.errors]
            known = [value for value in judged if value is not None]
            printed = [f"{by[count]:.1f} %" if count in by else MISSING for by in REFORMER.values()]
            rows.append([str(count), error(fmean(known)) if known else MISSING, *printed])
        trained = (f"Accuracy, trained with {name}" for name in REFORMER)
        columns = ["Rounds", "Error against exact shared-QK attention", *trained]
        grids.append(Grid(f"{inputs} inputs", columns, rows))
    return grids


def _based(points: Sequence[Point]) -> list[Grid]:
    families = sorted({p.inputs or "" for p in points})
    rows = []
    for order in sorted({int(p.series.parameters["order"] or 0) for p in points if p.series.mechanism == "based"}):
        found = _matching(points, order=order)
        rows.append([str(order), *(_mean_error([p for p in found if p.inputs == one]) for one in families)])
    ours = Grid("Relative error by order of the Taylor expansion", ["Order", *families], rows)
    printed = [[str(width), *(str(number) for number in numbers)] for width, numbers in BASED.items()]
    columns = ["Feature dimension", "Expanded to", "SWDE accuracy", "Associative-recall perplexity"]
    caption = "Printed: order 2 by feature dimension, 362M parameters, 10B tokens of the Pile"
    return [ours, Grid(caption, columns, printed)]


def _rala(points: Sequence[Point]) -> list[Grid]:
    grids = []
    for inputs in sorted({p.inputs or "" for p in points}):
        rows = []
        for point in sorted((p for p in points if p.inputs == inputs), key=lambda p: p.series.order):
            block = next((record.structure for record in point.measured if record.structure), None)
            if block:
                ranks = (f"{block.output_effective_rank:.1f}", f"{block.output_numerical_rank:.1f}")
                name = ", ".join(f"{k}={v}" for k, v in point.series.parameters.items())
                rows.append([point.series.mechanism, name or MISSING, *ranks, str(block.largest_rank)])
        columns = ["Mechanism", "Hyperparameters", "Effective rank", "Numerical rank", "Largest possible"]
        grids.append(Grid(f"{inputs} inputs", columns, rows))
    return grids


def _latency(point: Point) -> float | None:
    return point.latency_ms.value if point.latency_ms else None


def _memory(point: Point) -> float | None:
    return point.memory_bytes.value if point.memory_bytes else None


def _in(points: Sequence[Point], implementation: str) -> list[Point]:
    return [point for point in points if point.series.implementation == implementation]


def _lengths(points: Sequence[Point]) -> list[int]:
    return sorted({point.length for point in points})


def _matching(points: Sequence[Point], **parameters: Scalar) -> list[Point]:
    return [p for p in points if all(p.series.parameters.get(k) == v for k, v in parameters.items())]


def _value(
    points: Sequence[Point], value: Callable[[Point], float | None], length: int, mechanism: str, **parameters: Scalar
) -> float | None:
    found = [p for p in _matching(points, **parameters) if p.length == length and p.series.mechanism == mechanism]
    return next((x for p in found if (x := value(p))), None)


def _pair(above: float | None, below: float | None) -> str:
    return ratio(above / below) if above and below else MISSING


def _mean_error(points: Sequence[Point]) -> str:
    """Mean over seeds of the relative error."""
    judged = [block.relative_error for point in points for block in point.errors]
    return error(fmean(judged)) if judged else MISSING


def _kernel(points: Sequence[Point]) -> str:
    blocks = [record.kernel for point in points for record in point.measured if record.kernel]
    if not blocks:
        return MISSING
    return f"{error(fmean(b.relative_mse for b in blocks))} / {error(fmean(b.expected_relative_mse for b in blocks))}"


PAPERS = (
    Paper(
        "paper_linformer",
        "Beside the paper: Linformer, table 3",
        [
            "Inference of a whole 12-layer model on a V100 there, one operator here, so the factors cannot be equal. "
            "The shape is to be: no gain where k is near N, and a factor that grows as N/k. Time is held against fused "
            "attention, memory against that which stores its probabilities (softmax/math), as theirs did: fused "
            "attention needs no more memory than Linformer. A dash: exact attention did not finish in time here, or "
            "the paper prints nothing."
        ],
        _linformer,
    ),
    Paper(
        "paper_performer",
        "Beside the paper: Performer, figure 4",
        [
            "The paper plots the squared error of the output over the number of features m at N = 4,096, D = 16, "
            "without printing numbers: orthogonal rows below independent ones, and every curve falling. The closed "
            "form of the kernel's error (lemma 2) is exact for independent rows, a bound for orthogonal ones. Sharp "
            "inputs give it a tail so heavy that a sample of pairs stays orders of magnitude below it: there no "
            "estimate is usable."
        ],
        _performer,
    ),
    Paper(
        "paper_reformer",
        "Beside the paper: Reformer, table 2",
        [
            "The paper prints the accuracy of a trained model on duplicated sequences of 1,024 tokens by the number of "
            "rounds at evaluation; here it is the error of the operator. Both gain with every round, the first most."
        ],
        _reformer,
    ),
    Paper(
        "paper_based",
        "Beside the paper: Based, Taylor features",
        ["The paper takes order 2 for its quality at a given state size and prints it by feature dimension (table 6)."],
        _based,
    ),
    Paper(
        "paper_nystrom",
        "Beside the paper: Nyströmformer, table 1",
        [
            "Memory and time of a layer on a 1080 Ti there, one forward pass of the operator here: compare ratios. "
            "Time is held against fused attention, memory against that which stores its probabilities (softmax/math), "
            "as theirs did."
        ],
        _nystrom,
    ),
    Paper(
        "paper_rala",
        "Beside the paper: RALA, rank of the output",
        [
            "The paper shows the ranks of feature maps of trained networks in a figure and prints no numbers: full for "
            "softmax, far below for linear attention, full again for RALA. Untrained, only the gate can lift them."
        ],
        _rala,
    ),
)
