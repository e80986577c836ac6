"""``linbench gate speed --base REF``: is this change slower, wrong, or larger?

The floor comes first: what the machine makes of base against base. Then blocks of base and head, more of them for what
is undecided while there is time, and a second look, alone, at whatever is called slower.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from linbench.cell import Cell
from linbench.environment import available_memory_bytes, default_threads
from linbench.gate.session import Session, Watched
from linbench.gate.statistics import (
    LEVEL,
    THRESHOLD,
    Verdict,
    controlled_level,
    decided,
    floor,
    interval,
    ratio,
    smaller_p,
)
from linbench.gate.trees import Tree, UnusableError, two_trees
from linbench.protocol import ForeseeRequest, Measure
from linbench.stats import Estimate
from linbench.sweep import MEMORY_SHARE

FLOOR_BLOCKS, FIRST_BLOCKS, FURTHER_BLOCKS, AGAIN_BLOCKS = 3, 6, 3, 6
MOST_BLOCKS = 24
"""Of one cell, disturbed ones included: what is undecided then stays so."""
FEWEST_BLOCKS = 3
"""That can call anything different: of two, the most extreme arrangement has a probability of 1/36."""
WORST_FLOOR = 0.5
"""A machine that makes more than this of identical code cannot tell anything."""
MEMORY_GROWTH, MEMORY_SLACK_BYTES = 1.05, 2**20
"""Peak memory beyond which head is larger."""


@dataclass(frozen=True)
class Asked:
    """What is compared, and how much it may cost."""

    repository: Path
    base: str
    head: str | None = None
    """None: the working tree."""
    threshold: float = THRESHOLD
    budget_s: float = 1800.0
    everything: bool = False
    """Cells that run the same code in both trees, too."""
    seed: int = 0


@dataclass(frozen=True)
class Finding:
    """What the gate says of one cell."""

    cell: Cell
    verdict: Verdict
    reason: str = ""
    ratio: Estimate | None = None
    """Head over base, with Student's interval over blocks."""
    smallest: float | None = None
    """The smallest median of head over that of base."""
    p_slower: float | None = None
    floor: float | None = None
    blocks: int = 0
    dropped: int = 0


@dataclass
class Result:
    """A whole gate."""

    findings: list[Finding] = field(default_factory=list)
    untouched: list[Cell] = field(default_factory=list)
    """Cells that were not measured: they run the same code in both trees."""
    commits: dict[str, str] = field(default_factory=dict)
    invalid: str = ""
    """Why nothing could be compared."""
    processes: int = 0
    spent_s: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The worst of its cells."""
        if self.invalid:
            return Verdict.INVALID
        found = {finding.verdict for finding in self.findings}
        for verdict in (Verdict.WRONG, Verdict.SLOWER, Verdict.INVALID, Verdict.UNDECIDED):
            if verdict in found:
                return verdict
        return Verdict.PASS

    @property
    def exit_code(self) -> int:
        """0 pass, 1 slower or wrong, 3 undecided, 4 invalid."""
        return {Verdict.PASS: 0, Verdict.WRONG: 1, Verdict.SLOWER: 1, Verdict.UNDECIDED: 3, Verdict.INVALID: 4}[
            self.verdict
        ]


def gate(cells: Sequence[Cell], measures: dict[str, Measure], time_limit_s: float, asked: Asked) -> Result:
    """Compare the two trees on these cells.

    Raises:
        UsageError: no such commit, or no git repository.
    """
    started = time.monotonic()
    result = Result()
    try:
        with two_trees(asked.repository, asked.base, asked.head) as (base, head):
            result.commits = {"base": base.commit, "head": head.commit}
            touched = list(cells) if asked.everything else touched_cells(cells, measures, base, head)
            result.untouched = [cell for cell in cells if cell not in touched]
            limit = int(available_memory_bytes() * MEMORY_SHARE)
            session = Session(base, head, measures, limit, time_limit_s, asked.seed)
            watched = [Watched(cell) for cell in touched]
            result.findings = compare(session, watched, asked, started + asked.budget_s)
            result.processes = session.spent_processes
    except UnusableError as error:
        result.invalid = str(error)
    result.spent_s = time.monotonic() - started
    return result


def touched_cells(cells: Sequence[Cell], measures: dict[str, Measure], base: Tree, head: Tree) -> list[Cell]:
    """Those whose code differs: the hash of all source that makes a cell's numbers, taken in each tree.

    What cannot run in either tree is left out.
    """
    request = ForeseeRequest(cells=list(cells), measures=measures, threads=default_threads())
    asked = [{"kind": "foresee", "request": request.model_dump(mode="json", by_alias=True)}]
    limit_s = 120.0
    first, second = (tree.answers(asked, limit_s)[0]["prospects"] for tree in (base, head))
    return [
        cell
        for cell, one, other in zip(cells, first, second, strict=True)
        if one["code"] != other["code"] and not (one.get("unsupported") and other.get("unsupported"))
    ]


def compare(session: Session, watched: list[Watched], asked: Asked, deadline: float) -> list[Finding]:
    """Floor, blocks, more blocks for the undecided, a second look at the slower."""
    session.run_blocks(watched, FLOOR_BLOCKS, "floor_blocks")
    session.run_blocks(watched, FIRST_BLOCKS)
    findings = judged(watched, asked.threshold)
    while time.monotonic() < deadline:
        open_ones = [one for one, finding in zip(watched, findings, strict=True) if _open(finding)]
        if not open_ones:
            break
        session.run_blocks(open_ones, FURTHER_BLOCKS)
        findings = judged(watched, asked.threshold)
    for index, (one, finding) in enumerate(zip(watched, findings, strict=True)):
        if finding.verdict is Verdict.SLOWER:
            session.run_blocks([one], AGAIN_BLOCKS, "again")
            findings[index] = _confirmed(one, finding, asked.threshold)
    return findings


def _open(finding: Finding) -> bool:
    """Whether more blocks could decide."""
    disturbed = finding.verdict is Verdict.INVALID and finding.dropped > 0
    undecided = finding.verdict is Verdict.UNDECIDED
    return (disturbed or undecided) and finding.blocks + finding.dropped < MOST_BLOCKS


def judged(watched: Sequence[Watched], threshold: float) -> list[Finding]:
    """One finding for each cell, the level shared among them (Benjamini and Hochberg)."""
    p_values = [p for one in watched if one.blocks for p in smaller_p(one.blocks)]
    level = controlled_level(p_values, LEVEL)
    return [_finding(one, threshold, level) for one in watched]


def _finding(one: Watched, threshold: float, level: float) -> Finding:
    if "head" in one.failures and "base" not in one.failures:
        return Finding(one.cell, Verdict.WRONG, f"head: {one.failures['head']}")
    if one.failures:
        return Finding(one.cell, Verdict.INVALID, f"base: {one.failures['base']}")
    if len(one.blocks) < FEWEST_BLOCKS:
        reason = "too few blocks were undisturbed by other processes"
        return Finding(one.cell, Verdict.INVALID, reason, blocks=len(one.blocks), dropped=one.dropped)
    seen = floor(one.floor_blocks, one.blocks)
    finding = Finding(
        one.cell,
        decided(one.blocks, max(threshold, seen), level),
        ratio=interval(one.blocks),
        smallest=ratio(one.blocks),
        p_slower=smaller_p(one.blocks)[0],
        floor=seen,
        blocks=len(one.blocks),
        dropped=one.dropped,
    )
    if growth := _growth(one):
        return replace(finding, verdict=Verdict.WRONG, reason=growth)
    if seen > WORST_FLOOR:
        return replace(finding, verdict=Verdict.INVALID, reason=f"base differs from itself by {seen:.0%}")
    return finding


def _growth(one: Watched) -> str:
    """How much larger head is; empty when it is not."""
    base, head = (one.memory_bytes[side] for side in ("base", "head"))
    if not base or not head or median(head) <= median(base) * MEMORY_GROWTH + MEMORY_SLACK_BYTES:
        return ""
    return f"head takes {median(head):,.0f} bytes at its peak, base {median(base):,.0f}"


def _confirmed(one: Watched, finding: Finding, threshold: float) -> Finding:
    """SLOWER stays only where the cell alone, in processes of its own, is slower again."""
    limit = max(threshold, finding.floor or 0.0)
    if one.again and decided(one.again, limit, LEVEL) is Verdict.SLOWER:
        return finding
    return replace(finding, verdict=Verdict.UNDECIDED, reason="slower among the others, not alone")
