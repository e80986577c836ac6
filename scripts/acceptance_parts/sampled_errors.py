"""Does the error over a sample of rows agree with the error over all of them?"""

from __future__ import annotations

from acceptance_parts.finding import Claim, Part, sweep

TOKENS = 16384
SHAPE = ("heads=2", "head_dim=32", "dtype=float32", "time_limit_s=600", "measure=[error]", "rounds=1")
CELLS = (
    "mechanism=[linear,performer,longformer,retnet,linformer,efficient,based,gla]",
    "inputs=[local,smooth]",
    "causal=[false,true]",
    f"length={TOKENS}",
    "measure.error.seeds=1",
)


def measure() -> Part:
    """512 sampled rows, and all 16,384, of the same cells."""
    sampled = sweep(*CELLS, *SHAPE, "measure.error.full_up_to_tokens=4096")
    full = sweep(*CELLS, *SHAPE, f"measure.error.full_up_to_tokens={TOKENS}")
    rows, inside = [], 0
    for one, all_rows in zip(sampled.records, full.records, strict=True):
        if one.error is None or all_rows.error is None or one.error.relative_error_interval is None:
            continue
        low, high = one.error.relative_error_interval
        truth = all_rows.error.relative_error
        inside += low <= truth <= high
        rows.append(
            {"cell": one.cell.label, "sampled": one.error.relative_error, "low": low, "high": high, "full": truth}
        )
    share = inside / len(rows)
    claim = Claim(
        claim=f"the full error lies in the sample's 95 % interval in {inside} of {len(rows)} cells",
        measured=share,
        bound=0.85,
        holds=share >= 0.85,
        note="95 % are expected; below 85 % the interval would be too narrow",
    )
    worst = max(abs(row["sampled"] / row["full"] - 1) for row in rows)  # type: ignore[operator]
    near = Claim(
        claim="the sampled error is within 10 % of the full one everywhere",
        measured=worst,
        bound=0.1,
        holds=worst <= 0.1,
    )
    return Part(
        part="sampled_errors",
        question=f"Does the error over 512 sampled rows agree with that over all {TOKENS:,}?",
        claims=[claim, near],
        commands=[sampled.command, full.command],
        environment=full.run.environment,
        details={"cells": rows},
    )
