"""Does exact attention, judged like any other mechanism, score an excess of one?"""

from __future__ import annotations

from acceptance_parts.finding import Part, at_most, sweep

BOUND = 0.25
"""Two exact computations round in different orders: their errors are alike, not equal."""


def measure() -> Part:
    """Fused and stored-probabilities softmax in three dtypes, on four families of inputs."""
    done = sweep(
        "mechanism=softmax",
        "implementation=[torch,math]",
        "dtype=[float32,bfloat16,float16]",
        "inputs=[gaussian,local,smooth,clustered]",
        "length=[777,2048]",
        "heads=4",
        "measure=[error]",
        "rounds=1",
        "time_limit_s=300",
    )
    excesses: dict[tuple[str, str], list[float]] = {}
    for record in done.records:
        if record.error is not None and record.error.excess is not None:
            excesses.setdefault((record.cell.implementation, record.cell.dtype), []).append(record.error.excess)
    claims = [
        at_most(
            f"softmax/{implementation} in {dtype}: excess within {BOUND:.0%} of 1 in {len(found)} cells",
            max(abs(excess - 1) for excess in found),
            BOUND,
            note=f"from {min(found):.3f} to {max(found):.3f}",
        )
        for (implementation, dtype), found in sorted(excesses.items())
    ]
    return Part(
        part="exact_attention",
        question="Does exact attention, judged like any other mechanism, score an excess of 1.0?",
        claims=claims,
        commands=[done.command],
        environment=done.run.environment,
    )
