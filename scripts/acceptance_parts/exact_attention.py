"""Does exact attention, judged like any other mechanism, score an excess of one?"""

from __future__ import annotations

from acceptance_parts.finding import Claim, Part, at_most, sweep

BOUND = 0.05
"""What same-dtype exact attention is taken to be rounds as a fused kernel does; the orders of its sums may differ."""
STORED_BOUND = 1.35
"""With stored probabilities other things are rounded: such a result may be better, and not much worse."""


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
    claims = [_claim(*cell, found) for cell, found in sorted(excesses.items())]
    return Part(
        part="exact_attention",
        question="Does exact attention, judged like any other mechanism, score an excess of 1.0?",
        claims=claims,
        commands=[done.command],
        environment=done.run.environment,
    )


def _claim(implementation: str, dtype: str, found: list[float]) -> Claim:
    name, note = (
        f"softmax/{implementation} in {dtype}, {len(found)} cells",
        f"from {min(found):.3f} to {max(found):.3f}",
    )
    if implementation == "torch":
        off = max(abs(excess - 1) for excess in found)
        return at_most(f"{name}: distance of the excess from 1", off, BOUND, note=note)
    return at_most(f"{name}, probabilities stored: largest excess", max(found), STORED_BOUND, note=note)
