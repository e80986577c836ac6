"""Is a known time recovered?"""

from __future__ import annotations

from acceptance_parts.finding import Claim, Part, at_most, sweep

BUSY_MS = (1.0, 3.0, 10.0, 30.0)
ASLEEP_MS = (10.0, 30.0, 100.0)
"""Long enough that the system's lateness in waking a sleeper, some 0.1 ms, does not count."""
BOUND = 0.02


def measure() -> Part:
    """The same small product with a known time before it, over the product alone."""
    shape = ("length=64", "heads=2", "head_dim=16", "causal=false", "measure=[speed]", "measure.speed.budget_s=1")
    claims, commands, details = [], [], {}
    for name, how, known_ms in (("spins", "busy", BUSY_MS), ("sleeps", "asleep", ASLEEP_MS)):
        target = f"mechanism._target_=acceptance_mechanisms.{name.capitalize()}"
        values = ",".join(f"{value:g}" for value in (0.0, *known_ms))
        done = sweep("mechanism=[]", target, f"mechanism.{name}.milliseconds=[{values}]", *shape)
        times = {record.cell.hyperparameters["milliseconds"]: record.latency_ms or 0.0 for record in done.records}
        commands.append(done.command)
        details[f"{name}_ms"] = {f"{known}": time for known, time in times.items()}
        claims += [_claim(how, known, times[known] - times[0.0]) for known in known_ms]
    question = "Is a known time inside a call recovered, over the same call without it?"
    return Part(
        part="known_times",
        question=question,
        claims=claims,
        commands=commands,
        environment=done.run.environment,
        details=details,
    )


def _claim(how: str, known: float, found: float) -> Claim:
    off = abs(found - known) / known
    return at_most(f"{known:g} ms {how} are found within {BOUND:.0%}", off, BOUND, note=f"{found:.4f} ms")
