"""Can the error of a million tokens be had in a minute, in memory that grows with N?"""

from __future__ import annotations

import math

from acceptance_parts.finding import Part, at_most, sweep

LENGTHS = (262_144, 524_288, 1_048_576)
LIMIT_S = 60.0


def measure() -> Part:
    """Linear attention against exact softmax on 512 rows, both masks; the memory of its call at three lengths."""
    words = (
        "mechanism=linear",
        "inputs=local",
        "heads=1",
        "head_dim=64",
        "rounds=1",
        "time_limit_s=300",
        "device.cpu.threads=2",
    )
    longest = sweep(*words, f"length={LENGTHS[-1]}", "causal=false", "measure=[error]")
    claims = [
        at_most(
            "the whole command ends, from start to report",
            longest.wall_s,
            LIMIT_S,
            "s",
            f"{longest.records[0].error.rows if longest.records[0].error else 0} rows of {LENGTHS[-1]:,}",
        )
    ]
    causal = sweep(*words, f"length={LENGTHS[-1]}", "causal=true", "measure=[error]")
    claims.append(at_most("the same, causal", causal.wall_s, LIMIT_S, "s"))
    grown = sweep(*words, f"length=[{','.join(map(str, LENGTHS))}]", "causal=[false,true]", "measure=[memory]")
    held = {
        (record.cell.causal, record.cell.length): record.memory.increment_bytes + record.memory.inputs_bytes
        for record in grown.records
        if record.memory is not None
    }
    for causal_form in (False, True):
        exponent = math.log(held[causal_form, LENGTHS[-1]] / held[causal_form, LENGTHS[0]], LENGTHS[-1] / LENGTHS[0])
        name = "causal" if causal_form else "without a mask"
        claims.append(at_most(f"memory of inputs and call, {name}, grows like N to the power of", exponent, 1.05))
    return Part(
        part="million_tokens",
        question="Can the error of 1,048,576 tokens be had in a minute on two cores, in memory linear in N?",
        claims=claims,
        commands=[longest.command, causal.command, grown.command],
        environment=longest.run.environment,
        details={
            "errors": [sweep_.records[0].error.model_dump() for sweep_ in (longest, causal) if sweep_.records[0].error],
            "bytes": {f"causal={form} N={length}": value for (form, length), value in sorted(held.items())},
        },
    )
