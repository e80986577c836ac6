"""Where the numbers come from: the environment of each run and the command that makes it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from linbench.record import Frontier, Record, Run
from linbench.report.units import size


@dataclass(frozen=True)
class Provenance:
    """One run, as the page shows it."""

    run: str
    time: str
    command: str
    records: str
    facts: list[tuple[str, str]]
    """What the environment was: name and value, without those that it does not have."""


def make_provenance(
    runs: Sequence[Run], records: Sequence[Record], frontiers: Sequence[Frontier] = ()
) -> tuple[list[Provenance], list[str]]:
    """One block for each run, and the names of runs that records mention but nobody described."""
    searches = Counter(line.run for line in frontiers)
    counts = Counter(record.run for record in records) + searches
    unknown = sorted(set(counts) - {run.run for run in runs})
    blocks = [
        Provenance(run.run, run.time, run.command, _answered(counts[run.run], run, searches), _facts(run))
        for run in runs
    ]
    return blocks, unknown


def _answered(lines: int, run: Run, searches: Counter[str]) -> str:
    return f"{lines:,} of {run.cells:,} {'series' if run.run in searches else 'cells'}"


def _facts(run: Run) -> list[tuple[str, str]]:
    env = run.environment
    commit = f"{env.commit}, with uncommitted changes {env.dirty}" if env.commit and env.dirty else env.commit
    facts = [
        ("Machine", env.machine),
        ("Processor", f"{env.cpu}, {env.cores_physical} cores ({env.cores_logical} logical)"),
        ("Vector extensions", ", ".join(env.cpu_flags)),
        ("Threads of CPU cells", str(env.threads)),
        ("Memory", size(env.memory_bytes)),
        ("GPUs", ", ".join(env.gpus)),
        ("Driver, CUDA", ", ".join(part for part in (env.driver, env.cuda) if part)),
        ("System", env.os),
        ("Clock source, governor", ", ".join(part for part in (env.clock, env.governor) if part)),
        ("Python, torch", f"{env.python}, {env.torch}"),
        ("Triton", env.triton or ""),
        ("BLAS", env.blas),
        ("linbench", f"{env.linbench}{f' at {commit}' if commit else ''}"),
    ]
    return [(name, value) for name, value in facts if value]
