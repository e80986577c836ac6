"""The contract of a result: what became of a cell, and which numbers each outcome may carry.

Schema history (the number is in every line that is written; readers keep every older one):

1. First version: a ``run`` line with the environment, then one ``cell`` line for each cell.
2. ``cost`` says how time and memory are claimed to grow; ``error`` judges against the mechanism's own target where it
   has one; blocks ``fit``, ``structure`` and ``kernel``.
3. ``speed`` says whether the warm-up became steady; ``error`` has positions, gradients and seeds; ``structure`` has the
   implied attention map.
4. Rounds in processes of several servers; evidence of what disturbed a time; peaks of the device; cold starts,
   frontiers; passes ``prefill`` and ``decode``; what is kept for the backward and for the next token.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from linbench.cell import Cell

SCHEMA_VERSION = 4


class Status(StrEnum):
    """What became of a cell. Only ``ok`` and ``noisy`` carry measurements."""

    OK = "ok"
    NOISY = "noisy"
    OOM = "oom"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    COMPILE_ERROR = "compile_error"
    INCORRECT = "incorrect"
    CRASH = "crash"
    IMPOSSIBLE = "impossible"


MEASURED = frozenset({Status.OK, Status.NOISY})


class Block(BaseModel):
    """A part of a record: no unknown fields, no NaN, no infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True, use_attribute_docstrings=True)


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


class Speed(Block):
    """Raw samples of time. Statistics are computed on reading."""

    clock: Literal["perf_counter", "cuda_event"]
    warmup_ms: list[float]
    """The calls before the samples, in order; the first one holds compilation and first touches."""
    warmup_stop: Literal["steady", "limit"] | None = None
    """Whether the calls had become steady before the first sample, or the warm-up ran into its limit; null in records
    that did not ask."""
    samples_ms: list[float]
    """Milliseconds of one call each (of the mean call, when ``calls_per_sample`` is above 1), in order."""
    calls_per_sample: int
    stop: Literal["converged", "time_budget", "sample_limit"]
    """Why sampling ended: the interval of the median was narrow enough, or the budget or the limit was reached."""
    threads: int
    foreign_cpu_cores: float | None = None
    """Cores kept busy by other processes while sampling; null where the system does not tell."""


class Memory(Block):
    """Peak memory of one call beyond what was there before it (inputs and parameters)."""

    method: Literal["VmHWM", "torch.cuda.max_memory_allocated"]
    increment_bytes: int
    """Median of ``samples_bytes``: peak during the call minus the level just before it."""
    samples_bytes: list[int]
    inputs_bytes: int
    """Bytes of q, k, v and extras, and of the output's gradient where the pass reads one: not in the increment."""
    total_peak_bytes: int | None = None
    """The peak itself, with all that was there before: of the process on the CPU, libraries included; of torch's
    allocator on CUDA. Median over the calls, as all that follow; null in records that did not ask."""
    saved_for_backward_bytes: int | None = None
    """What stays allocated after a forward beyond its output, until the backward; null for passes without one."""
    state_bytes: int | None = None
    """Of the state from which the next token is decoded, whole batch, after ``state_tokens`` tokens; null where the
    mechanism does not decode. The cost model's figure for all N tokens is in ``cost``."""
    state_tokens: int | None = None
    """The cell's length, or 256 where that is less."""
    reserved_bytes: int | None = None
    """CUDA: rise of what torch's allocator has taken from the driver, from an emptied cache on."""
    driver_bytes: int | None = None
    """CUDA: how much less memory of the device was free after the call than before, by the driver; it counts others'
    memory, too."""


class PositionError(Block):
    """The relative error of the queries in one part of the sequence."""

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


class ColdStart(Block):
    """Stages of fresh interpreters on their way to a steady call: one number for each process, in their order."""

    interpreter_ms: list[float]
    """From the start of the process to the first line that it runs."""
    import_torch_ms: list[float]
    import_mechanism_ms: list[float]
    """After torch: the mechanism's module, and what of linbench it needs."""
    device_ms: list[float] | None = None
    """The device's context and a first allocation; null on the CPU."""
    build_ms: list[float]
    """The mechanism with its parameters, on the device."""
    first_call_ms: list[float]
    """One call of the pass. The inputs are there already; drawing them is in no stage."""
    steady_calls_ms: list[list[float]]
    """The calls after it, in order."""
    compile_ms: list[float]
    """What the first call takes longer than the median of those: compilation, first touches; below 0 by noise only."""
    autotune_ms: list[float] | None = None
    """The part of it in which Triton's autotuners tried configurations; null where a process tuned nothing."""
    compiler_cache: list[Literal["empty", "filled"]] | None = None
    """Whether the compilers' caches on disk held anything before the first call; null where nothing compiles."""


class Record(Block):
    """What became of a cell: a status, the reason where it is not ``ok``, and the blocks that this status allows."""

    kind: Literal["cell"] = "cell"
    schema_version: int = SCHEMA_VERSION
    run: str
    """Name of the run whose file holds this record."""
    time: str
    """When the cell ended, UTC, ISO 8601."""
    cell: Cell
    code: str
    """Hash of the source that made the numbers: mechanism, inputs, measures, library versions."""
    measures: list[str]
    """The measures that were asked for."""
    status: Status
    reason: str | None = None
    time_limit_s: float
    memory_limit_bytes: int | None = None
    stages_s: dict[str, float] = Field(default_factory=dict)
    """Seconds that the worker spent in each stage."""
    elapsed_s: float
    """Seconds from the parent's request to the record."""
    cost: Cost | None = None
    check: Check | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    error: Error | None = None
    fit: Fit | None = None
    structure: Structure | None = None
    kernel: Kernel | None = None
    cold_start: ColdStart | None = None

    @model_validator(mode="after")
    def _status_decides_blocks(self) -> Record:
        if self.status is not Status.OK and not self.reason:
            raise ValueError(f"a record with status {self.status} needs a reason")
        if self.status in MEASURED and (self.check is None or not self.check.passed):
            raise ValueError(f"a record with status {self.status} needs a check that passed")
        if self.status is Status.INCORRECT and (self.check is None or self.check.passed):
            raise ValueError("a record with status incorrect needs a check that failed")
        measured = (self.speed, self.memory, self.error, self.fit, self.structure, self.kernel, self.cold_start)
        if self.status not in MEASURED and any(measured):
            raise ValueError(f"a record with status {self.status} cannot carry a measurement")
        return self


class Environment(Block):
    """Where and with what a run was measured."""

    machine: str
    """Folder name under ``results/``: the device's model in lower case, with its core count."""
    cpu: str
    cpu_flags: list[str]
    """The vector extensions among the processor's flags."""
    cores_physical: int
    cores_logical: int
    threads: int
    """Threads of CPU cells."""
    memory_bytes: int
    gpus: list[str]
    driver: str | None = None
    cuda: str | None = None
    python: str
    torch: str
    triton: str | None = None
    blas: str
    os: str
    clock: str
    """The kernel's clock source."""
    governor: str | None = None
    linbench: str
    commit: str | None = None
    dirty: str | None = None
    """Hash of the uncommitted changes, or null when there are none."""


class Run(Block):
    """The first line of a results file: what was asked for, and the environment that answered."""

    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA_VERSION
    run: str
    time: str
    command: str
    """The command that makes this run again."""
    cells: int
    """Cells in the plan, those already finished included; series in a file of frontiers."""
    environment: Environment


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
