"""Blocks that judge: cost, check, error, fit, structure, kernel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from linbench.record.base import CONTRACT, Block


class Cost(Block):
    """The mechanism's own cost model for the cell: what an ideal implementation has to do."""

    flops: int
    """Floating-point operations of the pass; one multiply-add is two. Exponentials and divisions are left out."""
    min_bytes: int
    """Bytes that must cross memory when every input is read once and every output written once."""
    state_bytes: int | None = None
    """Bytes kept to decode the next token after N tokens, or null when the mechanism cannot decode."""
    claimed_time: str | None = None
    """How the mechanism's time is claimed to grow with N, for example ``N log N``."""
    claimed_memory: str | None = None
    """The same for the memory of a forward pass."""


class Check(Block):
    """The output, and the gradients where the pass has them, against the mechanism's own fp64 reference."""

    passed: bool
    rows: int
    """Query rows that were compared."""
    rows_total: int
    relative_error: float | None = None
    """Frobenius norm of the difference over that of the reference, over the compared rows; null if not finite."""
    worst_row_error: float | None = None
    """Largest norm of one row's difference, over the root mean square norm of a reference row."""
    gradient_errors: dict[str, float] = Field(default_factory=dict)
    """Frobenius error of each gradient by name (``dq``, ``dk``, ``dv``, and extras), relative to that gradient's norm,
    or to a tenth of the norm of all gradients together where that is larger."""
    tolerance: float
    """The bound on ``relative_error`` and on each gradient's; ``worst_row_error`` may be ten times as large."""
    finding: str | None = None
    """What is wrong, when the check did not pass."""


@dataclass(config=CONTRACT, slots=True, kw_only=True)
class PositionError:
    """The relative error of the queries in one part of the sequence.

    A record has a dozen of them: slots take a third of what a model does, and of the time to read it.
    """

    first_token: int
    """Position of the first query, counted from 0."""
    last_token: int
    rows: int
    """How many of them were judged."""
    relative_error: float


class Error(Block):
    """The output against exact softmax attention in fp64 on the inputs as rounded."""

    protocol: int
    """Version of the definition in ``linbench/measure/error.py``."""
    reading: Literal["error", "distance"]
    """``error`` for exact mechanisms and approximators; ``distance`` for a different operator."""
    rows: int
    rows_total: int
    relative_error: float
    """Frobenius norm of (output − truth) over that of the truth."""
    relative_error_interval: tuple[float, float] | None = None
    """95 % bootstrap interval over query positions, when only a sample of rows was judged."""
    trivial_error: float
    """The same figure for the mean of the visible values."""
    exact_error: float
    """The same figure for exact attention computed in the cell's dtype."""
    skill: float | None = None
    """1 − relative_error / trivial_error: 1 is perfect, 0 is no better than the mean, negative is worse; null where the
    mean is the truth, as for a single token."""
    excess: float | None = None
    """relative_error / exact_error, or null when exact attention in this dtype makes no error at all."""
    row_cosine_mean: float
    row_error_quantiles: dict[str, float]
    """Quantiles of each row's own relative error: ``p05``, ``p50``, ``p95``, ``p99``, ``max``."""
    target_error: float | None = None
    """The relative error against what the mechanism approximates, where that is not softmax of q·kᵀ/√D: attention with
    unit keys, say; null for all others."""
    target_trivial_error: float | None = None
    """That of the mean of the visible values, against the same target."""
    by_position: list[PositionError] = Field(default_factory=list)
    """The relative error by where the query stands (protocol 2)."""
    gradient_errors: dict[str, float] = Field(default_factory=dict)
    """Relative errors of ``dq``, ``dk`` and ``dv`` against the gradients of exact softmax attention towards the same
    output gradient, where the pass has a backward and the sequence is not too long (protocol 2)."""
    seed_errors: list[float] = Field(default_factory=list)
    """Relative errors with several seeds of the mechanism, this cell's first, all on one sample of rows; empty where
    seeds make no difference, or none were asked for (protocol 2)."""


class Fit(Block):
    """Before and after fitting to exact softmax attention, both judged on inputs that the fit has not seen."""

    protocol: int
    """Version of the definition in ``linbench/measure/fit.py``."""
    steps: int
    learning_rate: float
    parameters: int
    """Numbers that were fitted: those of the mechanism and of the projections and gates around it."""
    own_parameters: int
    """Those of the mechanism itself among them."""
    first_loss: float
    """Mean squared relative error of the first ten training steps."""
    last_loss: float
    """That of the last ten."""
    selected_step: int | None = None
    """Number of steps after which the layer was judged: where a draw kept for that had the least loss (protocol 2)."""
    initial_validation_loss: float | None = None
    """Squared relative error on that draw before the first step."""
    selected_validation_loss: float | None = None
    """That at ``selected_step``."""
    initial_error: float
    """Relative error before the first step: projections are identities, gates half-way open."""
    initial_skill: float | None = None
    fitted_error: float
    """Relative error after ``selected_step`` steps; after the last one in protocol 1."""
    fitted_error_interval: tuple[float, float] | None = None
    """95 % bootstrap interval over query positions, when only a sample of rows was judged."""
    fitted_skill: float | None = None
    trivial_error: float
    """Relative error of the mean of the visible values."""


class MapPicture(Block):
    """The map of one head, coarse enough to keep: that of the first batch element, head and (of several) channel."""

    queries: list[int]
    """Position of the first query of every row."""
    keys: list[int]
    """Position of the first key of every column."""
    weights: list[list[float]]
    """Means over the queries of a row of the sums of the weights of a column's keys, to three digits."""
    exact_weights: list[list[float]]
    """The same of exact softmax."""


class AttentionMap(Block):
    """Rows of the matrix that the mechanism applies to the values, beside those of exact softmax.

    Means over the sampled rows, batch elements and heads.
    """

    rows: int
    """Query positions whose rows were looked at."""
    rows_total: int
    per_channel: bool
    """Whether every channel of a head has a matrix of its own; means are over these too."""
    residual: float
    """Relative distance of that matrix times v and the mechanism's output, at these rows."""
    row_sum_mean: float
    row_sum_min: float
    row_sum_max: float
    negative_mass: float
    """Sum of the sizes of negative weights over that of all weights."""
    entropy_nats: float | None = None
    """Of a row; null unless all rows are distributions."""
    exact_entropy_nats: float
    """That of exact softmax: the gap to it is what the map is too flat or too sharp."""
    divergence_nats: float | None = None
    """Kullback-Leibler divergence of the map's row from that of softmax; null unless all rows are distributions."""
    total_variation: float
    """Half the sum of the sizes of the differences of a row to that of softmax."""
    top: int
    top_overlap: float | None = None
    """Share of the ``top`` largest weights of softmax that are among as many of the map, over rows that see twice as
    many keys; null where no row does."""
    effective_rank: float
    """Of the matrix of the sampled rows; see ``linbench/measure/ranks.py``."""
    numerical_rank: float
    exact_effective_rank: float
    exact_numerical_rank: float
    distance_tokens: float
    """Mean number of tokens between query and key, weighted by the sizes of the weights."""
    exact_distance_tokens: float
    singular_values: list[float] = Field(default_factory=list)
    """Of the matrix of the sampled rows, in descending order and over the largest, to four digits (protocol 3)."""
    exact_singular_values: list[float] = Field(default_factory=list)
    picture: MapPicture | None = None
    """The map itself (protocol 3); null where none was asked for."""


class Structure(Block):
    """How many dimensions the output of a head has, beside that of exact softmax, and the map; means over heads."""

    protocol: int
    """Version of the definition in ``linbench/measure/structure.py``."""
    rows: int
    rows_total: int
    largest_rank: int
    """The smaller side of the matrices: no rank is larger."""
    output_effective_rank: float
    """exp of the entropy of the singular values as shares of their sum."""
    output_numerical_rank: float
    """Singular values above one hundredth of the largest."""
    exact_effective_rank: float
    """The same of exact softmax attention."""
    exact_numerical_rank: float
    output_singular_values: list[float] = Field(default_factory=list)
    """In descending order and over the largest, to four digits; the first 128 of them (protocol 3)."""
    exact_singular_values: list[float] = Field(default_factory=list)
    """The same of exact softmax attention."""
    attention: AttentionMap | None = None
    """The attention map that the mechanism implies (protocol 2); null where it has none or none was asked for."""
    attention_reason: str | None = None
    """Why there is none, where it was asked for."""


class Kernel(Block):
    """How well random features estimate their kernel, beside what theory says."""

    protocol: int
    """Version of the definition in ``linbench/measure/kernel.py``."""
    pairs: int
    """Pairs of a query and a key."""
    draws: int
    """Seeds of the features."""
    relative_mse: float
    """Mean over pairs and draws of (estimate / kernel − 1)²."""
    expected_relative_mse: float
    """Its closed form for independent Gaussian rows, mean over the same pairs."""
