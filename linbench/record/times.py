"""Blocks of time: raw samples, what else happened meanwhile, and cold starts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from linbench.record.base import Block


class Conditions(Block):
    """What else happened on the processors while the samples were taken; null where the system does not tell."""

    steal_cores: float | None = None
    """Cores that the hypervisor gave to other machines."""
    voluntary_switches: int | None = None
    """Times that this process gave its core away, to wait for something."""
    involuntary_switches: int | None = None
    """Times that a core was taken from this process, to run another."""
    affinity: list[int] = Field(default_factory=list)
    """Numbers of the cores that this process may use."""
    governor: str | None = None
    """Of the first of them: how its clock is chosen."""
    frequency_mhz: float | None = None
    """Mean clock of the cores after the last sample, as the system tells it."""


class DeviceConditions(Block):
    """The state of an NVIDIA GPU, read before the first sample, after the last and several times in between."""

    sm_clock_mhz: list[int]
    """Clock of the multiprocessors, in order."""
    memory_clock_mhz: list[int]
    power_watts: list[float]
    temperature_celsius: list[int]
    throttle_reasons: list[str]
    """What lowered the clocks at any reading, by NVML's names; idleness is none."""
    locked_sm_clock_mhz: int | None = None
    """The clock that was asked for and granted; null when the clocks were left alone."""
    discarded_samples: int = 0
    """Samples taken while the clocks were lowered: set aside, and taken again while the budget lasted."""
    lowered_samples: int = 0
    """Those that were kept nevertheless, because the clocks did not recover in time: the cell is noisy."""


class Speed(Block):
    """Raw samples of time. Statistics are computed on reading."""

    clock: Literal["perf_counter", "cuda_event"]
    """``perf_counter``: the host's. ``cuda_event``: the device's, each call behind a queue that keeps the device from
    waiting for the host, and with a cold second-level cache."""
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
    conditions: Conditions | None = None
    device_conditions: DeviceConditions | None = None
    host_ms: list[float] = Field(default_factory=list)
    """CUDA: milliseconds of one call on the host's clock, from many calls one after the other and a wait for the last:
    what a program that does nothing else pays. Empty on a CPU, where ``samples_ms`` is that."""
    graph_ms: list[float] = Field(default_factory=list)
    """CUDA: milliseconds of one replay of the call as a CUDA graph, on the device's clock with a cold second-level
    cache: kernels without their launches."""
    graph_reason: str | None = None
    """Why the call could not be captured as a graph, where it could not."""
    discarded_rounds: int = 0
    """Times that this was measured before and set aside, because other processes kept the machine busy."""


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
