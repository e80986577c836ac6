"""How to read a number: the words of a report."""

from __future__ import annotations

DEFINITIONS = (
    (
        "Latency",
        "the median time of one call, after warm-up, with its interval in brackets. It does not depend on the family "
        "of inputs: figures and crossovers pool the families, tables show each on its own.",
    ),
    (
        "Interval",
        "the range that holds the true median with 95 % confidence. Within one process it is made of order statistics "
        "and assumes no distribution; over the processes of several rounds it is Student's, over the logarithms of "
        "their medians, because one process is one sample of how memory lies. "
        "A dagger (†) marks five samples or fewer: their range, which is worth less than 95 %.",
    ),
    (
        "× exact",
        "latency over that of the fastest implementation of exact softmax attention in the same table: below 1 is "
        "faster. The sign ≈ says that the 95 % interval of the ratio holds 1: too close to call.",
    ),
    (
        "Memory increment",
        "peak memory of one call minus the level just before it: what the mechanism needs beyond its inputs and "
        "parameters.",
    ),
    (
        "Relative error",
        "Frobenius norm of (output − truth) over that of the truth, where the truth is exact softmax attention in fp64 "
        "on the inputs as rounded to the cell's dtype. The interval in brackets is over seeds where there are several, "
        "otherwise over the query rows that were sampled.",
    ),
    (
        "Skill",
        "1 − relative error / error of the mean of the visible values. 1 is perfect, 0 is no better than that mean, "
        "and negative is worse.",
    ),
    (
        "Excess",
        "relative error over the error that exact attention itself makes in this dtype: 1× is as good as exact.",
    ),
    (
        "Error or distance",
        "an error for exact mechanisms and those that approximate softmax attention. A different operator, which was "
        "never meant to give the same output, has a distance: it says how different, not how wrong.",
    ),
    (
        "Crossover",
        "the bracket between the longest length at which a mechanism is slower than the fastest exact implementation "
        "and the shortest from which on it is faster at every length measured, both for sure: the interval of the "
        "ratio lies on one side of 1. Nothing is fitted or extrapolated; “none up to N” says that none was seen.",
    ),
    (
        "Noisy",
        "a time that other processes (or a GPU's lowered clocks) disturbed in every attempt. Its numbers are shown, "
        "and count where there are no better ones.",
    ),
    (
        "Launch-bound",
        "on a CUDA device: more than a fifth of the host's time of a call passes without its kernels running. Such a "
        "time says more of Python and the driver than of the mechanism.",
    ),
    ("1k", "1,024 tokens; 1 KiB is 1,024 bytes."),
)

ROOFLINE = (
    "Share of roofline",
    "the least time that the peaks of the device allow, over the latency; in brackets the side that binds: the "
    "arithmetic or the bytes of the mechanism's cost model. Peaks were measured when the run began: matrix products in "
    "the cell's own dtype (in float32 where the device has none in that dtype), copies of a working set of that size. "
    "Implementations that compute in another dtype than the cell's are held against the cell's all the same. A dash: "
    "no peaks, or peaks of another number of threads.",
)
"""Only where a table has the column."""
