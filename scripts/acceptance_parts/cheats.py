"""Is a kernel that does not compute what it is timed for caught, and by name?"""

from __future__ import annotations

from acceptance_parts.finding import Claim, Part, sweep
from linbench.record import Status

CHEATS = {
    "RemembersItsOutput": "it is remembered, not computed",
    "RemembersUntilChanged": "it is remembered, not computed",
    "LeavesItsTail": "not all of it is written when the call returns",
    "ComputesElsewhere": "not all of it is written when the call returns",
    "DoesNothing": "relative error against the reference over",
    "ChangesItsInputs": "the timed call changes its inputs",
}


def measure() -> Part:
    """Every cheat, and the honest mechanism that they are made from, through a whole sweep."""
    targets = ",".join(f"acceptance_mechanisms.{name}" for name in ("Product", *CHEATS))
    shape = ("length=256", "heads=2", "head_dim=16", "causal=false", "measure=[speed]", "rounds=1")
    done = sweep("mechanism=[]", f"mechanism._target_=[{targets}]", *shape)
    by_target = {str(record.cell.target).rpartition(".")[2]: record for record in done.records}
    claims = []
    for name, words in CHEATS.items():
        record = by_target[name]
        caught = record.status is Status.INCORRECT and words in (record.reason or "") and record.speed is None
        claims.append(_claim(f"{name} is incorrect and carries no time", caught, record.reason or ""))
    honest = by_target["Product"]
    claims.append(_claim("Product, which is honest, is timed", honest.speed is not None, str(honest.status)))
    question = "Is a kernel that does not compute what it is timed for caught, by name?"
    environment = done.run.environment
    return Part(part="cheats", question=question, claims=claims, commands=[done.command], environment=environment)


def _claim(claim: str, holds: bool, note: str) -> Claim:
    return Claim(claim=claim, measured=float(holds), bound=1.0, holds=holds, note=note)
